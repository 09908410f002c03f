"""Which of the launches that could be compiled ahead of time one run of the tests compiles.

All of them take hours. What a family's ``calls()`` run is compiled each time; of what its ``more()`` run, and
of the rows of tables, a few are: the same ones until a kernel or a table changes, which draws others. Three
environment variables change that:

- ``KPT_AOT_SAMPLE``: how many calls of each family and of each table, for each architecture (2).
- ``KPT_AOT_ALL=1``: all of them.
- ``KPT_AOT_SEED``: the sample to repeat, as a failure names it.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

_PLUGINS = Path(__file__).parents[2]
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


def seed_number() -> int:
    """The seed as a number."""
    return int.from_bytes(_rank(seed())[:4], "big")


@functools.cache
def seed() -> str:
    """A hash of all kernels and tables: a change of something else keeps the sample."""
    given = os.environ.get("KPT_AOT_SEED")
    if given:
        return given
    digest = hashlib.blake2b(digest_size=6)
    for package in ("triton/kpt_plugin_triton", "rocm/kpt_plugin_rocm"):
        for path in sorted((_PLUGINS / package).rglob("*")):
            if path.suffix in (".py", ".json"):
                digest.update(path.relative_to(_PLUGINS).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()
