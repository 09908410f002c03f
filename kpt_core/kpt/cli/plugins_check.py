"""``kpt plugins check``: the conformance suite, without writing a test."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Annotated

import typer

from kpt.cli.options import Json
from kpt.cli.output import FINDING, CommandError, Output
from kpt.plugins.discovery import candidates
from kpt.plugins.validation import nearest

_MARKS = {"passed": ("✓", "+"), "skipped": ("-", "-"), "failed": ("✗", "x")}


def command(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="An installed plugin, or a module with hooks.")],
    as_json: Json = False,
) -> None:
    """Run the conformance suite on a plugin; exits with 3 where it fails.

    These are the standard tests of kpt.testing.PluginSuite: it loads without torch, its specs are
    valid, every reference imports, passes work on small models and are undone, kernels equal their
    references.
    """
    from kpt.cli.sources import require_torch

    output: Output = context.obj
    require_torch()
    # A process of its own: a plugin under test may crash, and must not find kpt's imports done.
    done = subprocess.run(
        [sys.executable, "-m", "kpt.testing", name], stdout=subprocess.PIPE, text=True, check=False
    )
    try:
        data = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise CommandError(
            "crashed",
            f"The process that checked {name!r} ended with {done.returncode} and no result.",
            f"Run it to see why: python -m kpt.testing {name}",
        ) from error
    if data["tests"][0]["reason"].endswith(f"No module named {name!r}"):
        installed = [candidate.name for candidate in candidates()[0]]
        known = nearest(name, installed) if installed else "none is installed"
        raise CommandError(
            "unknown-plugin", f"There is no plugin or module {name!r}; {known}.", "See kpt plugins list."
        )
    failed = [test for test in data["tests"] if test["state"] == "failed"]
    lines = [
        f"{output.mark(*_MARKS[test['state']])} {test['test'].removeprefix('test_').replace('_', ' ')}"
        + (f"\n    {test['reason']}" if test["reason"] else "")
        for test in data["tests"]
    ]
    lines.append(
        f"\n{name}: {len(failed)} of {len(data['tests'])} standard tests fail"
        if failed
        else f"\n{name} conforms"
    )
    output.result({**data, "conforms": not failed}, "\n".join(lines))
    if failed:
        raise typer.Exit(FINDING)
