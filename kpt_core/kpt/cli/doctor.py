"""``kpt doctor``: everything that may be wrong with an installation, and what mends it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from kpt.cli.findings import Finding, examine
from kpt.cli.options import Json
from kpt.cli.output import FINDING, Output

if TYPE_CHECKING:
    from rich.console import Group

_MARKS = {"ok": "✓", "note": "!", "fault": "✗"}
_PLAIN = {"ok": "+", "note": "!", "fault": "x"}
_STYLES = {"ok": "green", "note": "yellow", "fault": "bold red"}


def command(context: typer.Context, as_json: Json = False) -> None:
    """Examine the installation; name every fault with a command that mends it.

    Exits with 3 where something is at fault (✗); what is merely worth knowing (!) does not count.
    """
    output: Output = context.obj
    found = examine()
    faults = sum(finding.mark == "fault" for findings in found.values() for finding in findings)
    data = {
        "healthy": not faults,
        "areas": {area: [asdict(finding) for finding in findings] for area, findings in found.items()},
        "report": report(found),
    }
    marks = {name: output.mark(sign, _PLAIN[name]) for name, sign in _MARKS.items()}
    output.result(data, None if output.json else _shown(found, faults, marks))
    if faults:
        raise typer.Exit(FINDING)


def report(found: dict[str, list[Finding]], marks: Mapping[str, str] = _MARKS) -> str:
    """The findings as text to paste into an issue."""
    lines = []
    for area, findings in found.items():
        lines += [f"{area:<9}{marks[finding.mark]} {finding.text}" for finding in findings]
    return "\n".join(lines)


def _shown(found: dict[str, list[Finding]], faults: int, marks: Mapping[str, str]) -> Group:
    from rich.console import Group
    from rich.text import Text

    lines: list[Text] = []
    for area, findings in found.items():
        lines.append(Text(area, "bold"))
        for finding in findings:
            lines.append(
                Text.assemble("  ", (marks[finding.mark], _STYLES[finding.mark]), f" {finding.text}")
            )
            if finding.mend and finding.mark != "ok":
                lines.append(Text.assemble("      ", (finding.mend, "cyan")))
    summary = "nothing is at fault" if not faults else f"{faults} at fault"
    lines += [Text(), Text(summary, "bold"), Text(), Text("To paste into an issue:"), Text("```")]
    lines += [Text(line, "dim") for line in report(found, marks).splitlines()]
    return Group(*lines, Text("```"))
