"""Which of the launches that could be compiled ahead of time one run of the tests compiles.

All of them take hours. What a family's ``calls()`` run is compiled each time; of what its ``more()`` run, and
of the rows of tables, a few are: others for each commit, the same ones for the same commit. Three environment
variables change that:

- ``KPT_AOT_SAMPLE``: how many calls of each family and of each table, for each architecture (2).
- ``KPT_AOT_ALL=1``: all of them.
- ``KPT_AOT_SEED``: the commit whose sample to repeat, as a failure names it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

#: A call's name, and the function that runs it.
Named = tuple[str, Callable[[], None]]


def sample(calls: Iterable[Named], where: str) -> list[Named]:
    """The calls of this run; ``where`` tells the samples of several tests of one run apart."""
    named = list(calls)
    assert len({name for name, _ in named}) == len(named), f"{where}: two calls have one name"
    if os.environ.get("KPT_AOT_ALL") == "1":
        return named
    size = int(os.environ.get("KPT_AOT_SAMPLE", "2"))
    return sorted(named, key=lambda call: _rank(f"{seed()} {where} {call[0]}"))[:size]


def _rank(text: str) -> bytes:
    return hashlib.blake2b(text.encode()).digest()


@functools.cache
def seed() -> str:
    """The commit of this checkout; outside of one the same sample always."""
    given = os.environ.get("KPT_AOT_SEED")
    if given:
        return given
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return found.stdout.strip()
