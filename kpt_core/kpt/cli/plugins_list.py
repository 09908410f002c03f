"""``kpt plugins list``: the installed plugins and their states."""

from __future__ import annotations

import typer

from kpt.cli.options import Json
from kpt.cli.output import Output

MARKS = {"ok": ("✓", "green"), "disabled": ("-", "dim"), "hardware-absent": ("!", "yellow")}
FAULT = ("✗", "red")
PLAIN = {"✓": "+", "✗": "x"}


def command(context: typer.Context, as_json: Json = False) -> None:
    """List the installed plugins and their states.

    Nothing heavy is imported: plugins name their code, and it is imported when it is used. A plugin that
    does not come to an end is named, with the command that turns it off.
    """
    from kpt.cli.rehearsal import loaded

    output: Output = context.obj
    found = loaded().statuses
    if output.json:
        output.result({"plugins": [status.to_dict() for status in found]})
        return
    if not found:
        output.result({}, "No plugins are installed. The first one to try: pip install kpt-plugin-cpu")
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "plugin", "distribution", "version", "state"):
        table.add_column(column, no_wrap=True)
    table.add_column("hooks, or the reason and what mends it", overflow="fold")
    for status in found:
        mark, style = MARKS.get(status.state, FAULT)
        hooks = ", ".join(hook.removeprefix("kpt_") for hook in status.hooks)
        about = hooks if status.state == "ok" else f"{status.reason}\n{status.mend}".strip()
        table.add_row(
            Text(output.mark(mark, PLAIN.get(mark, mark)), style),
            status.name,
            status.distribution,
            status.version,
            status.state,
            Text(about),
        )
    output.result({}, table)
