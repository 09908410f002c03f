"""``kpt plugins show``: what one plugin offers."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any

import typer

from kpt.cli.options import Json
from kpt.cli.output import CommandError, Output


def command(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The plugin's name, as `kpt plugins list` prints it.")],
    as_json: Json = False,
) -> None:
    """Show what one plugin offers: its state and every spec that its hooks return."""
    from kpt.cli.rehearsal import loaded
    from kpt.plugins.validation import known_hooks, nearest

    output: Output = context.obj
    plugins = loaded()
    found = plugins.registry
    status = found.status(name)
    if status is None:
        names = [entry.name for entry in found.statuses]
        known = nearest(name, names) if names else "none is installed"
        raise CommandError(
            "unknown-plugin", f"There is no plugin {name!r}; {known}.", "See kpt plugins list."
        )
    status = next((entry for entry in plugins.statuses if _same(entry, status)), status)
    specs = {
        hook: [as_data(entry.spec) for entry in found.specs(hook) if _same(entry, status)]
        for hook in known_hooks()
    }
    offered = {hook: entries for hook, entries in specs.items() if entries}
    if output.json:
        output.result({**status.to_dict(), "specs": offered})
        return
    lines = [f"{status.name}  {status.state}  ({status.distribution} {status.version})"]
    if status.reason:
        lines += [f"  {status.reason}", f"  to mend it: {status.mend}"]
    for hook, entries in offered.items():
        lines.append(f"\n{hook}")
        for entry in entries:
            given = ", ".join(
                f"{key}={_shown(value)}" for key, value in entry.items() if key != "name" and value
            )
            lines.append(f"  {entry['name']}  {given}")
    output.result({}, "\n".join(lines))


def as_data(spec: Any) -> dict[str, Any]:
    """A spec as plain JSON values."""
    values = {entry.name: getattr(spec, entry.name) for entry in fields(spec)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _same(entry: Any, status: Any) -> bool:
    name = getattr(entry, "plugin", None) or entry.name
    return bool((name, entry.distribution) == (status.name, status.distribution))


def _shown(value: Any) -> str:
    return "|".join(map(str, value)) if isinstance(value, list) else str(value)
