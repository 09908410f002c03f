"""Which block sizes and warps a kernel runs with: measured tables for each architecture, else a rule.

The tables are ``tuned/<architecture>.json``, written by ``kpt bench --tune``; a user's own, from the
user data folder or ``KPT_TRITON_TUNED`` (a folder), comes before the packaged one. A shape that was not
measured takes the options of the nearest one of the same dtype, within a factor of two in each size
(attention: of exactly that head size and kind);
beyond that, and on architectures without a table, the kernel's rule decides.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from kpt_plugin_triton.launch import architecture, is_recording

#: Options of one launch: compile-time constants by name, ``num_warps`` and ``num_stages``.
Options = Mapping[str, int]

SCHEMA = 1
PACKAGED = Path(__file__).parent / "tuned"
#: How far, as a factor in each size, a measured shape may be from the one that is asked for.
REACH = 2.0


class Tuned:
    """The options of one kernel by dtype and sizes.

    Args:
        name: the kernel's name in the tables.
        sizes: the names of the integers that options depend on.
        rule: gives options for sizes (and the width of the dtype in bytes) that were never measured.
        candidates: the options worth timing for such sizes.
        reach: how far, as a factor in each size, a measured shape may be from the one that is asked for; 1
            where options that fit one size do not fit its double.
    """

    def __init__(
        self,
        name: str,
        sizes: tuple[str, ...],
        rule: Callable[..., dict[str, int]],
        candidates: Callable[..., Iterator[dict[str, int]]],
        reach: float = REACH,
    ) -> None:
        self.name = name
        self.sizes = sizes
        self.rule = rule
        self.candidates = candidates
        self.reach = reach
        self._chosen: dict[Any, Options] = {}
        KERNELS[name] = self

    def __call__(self, device: int | None, itemsize: int, *sizes: int) -> Options:
        """The options for one launch; looked up once for each combination."""
        if is_recording():
            return self.choose(architecture(device), itemsize, *sizes)
        key = (device, itemsize, sizes)
        found = self._chosen.get(key)
        if found is None:
            found = self.choose(architecture(device), itemsize, *sizes)
            self._chosen[key] = found
        return found

    def choose(self, arch: str, itemsize: int, *sizes: int) -> Options:
        """The options for an architecture by name, on this machine or not."""
        return _nearest(self.entries(arch), itemsize, sizes, self.reach) or self.rule(itemsize, *sizes)

    def entries(self, arch: str) -> list[dict[str, Any]]:
        """The measured rows of this kernel: ``itemsize``, ``sizes`` and ``options`` each."""
        return tables(arch).get(self.name, [])

    def forget(self) -> None:
        """Look everything up again, after a table was written."""
        self._chosen.clear()


#: Every kernel that has options, by name.
KERNELS: dict[str, Tuned] = {}


def _nearest(
    entries: list[dict[str, Any]], itemsize: int, sizes: tuple[int, ...], reach: float
) -> Options | None:
    best, best_distance = None, math.inf
    for entry in entries:
        if entry["itemsize"] != itemsize:
            continue
        steps = [abs(math.log2(max(a, 1) / max(b, 1))) for a, b in zip(sizes, entry["sizes"])]
        if max(steps, default=0.0) <= math.log2(reach) and sum(steps) < best_distance:
            best, best_distance = entry["options"], sum(steps)
    return best


@functools.cache
def tables(arch: str) -> dict[str, list[dict[str, Any]]]:
    """The measured rows of every kernel on ``arch``; the user's before the packaged ones."""
    merged: dict[str, list[dict[str, Any]]] = {}
    for folder in folders():
        path = folder / f"{arch}.json"
        if not path.exists():
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("schema") != SCHEMA:
            raise ValueError(
                f"{path} has schema {content.get('schema')!r}, this version reads {SCHEMA}; "
                f"delete it and run: kpt bench --tune"
            )
        for name, rows in content["kernels"].items():
            known = {(row["itemsize"], tuple(row["sizes"])) for row in merged.get(name, [])}
            fresh = [row for row in rows if (row["itemsize"], tuple(row["sizes"])) not in known]
            merged.setdefault(name, []).extend(fresh)
    return merged


def folders() -> list[Path]:
    """Where tables are looked for, the first that has a shape wins.

    Other distributions add theirs by an entry point of the group ``kpt_triton.tables`` that names the
    package they lie in.
    """
    own = os.environ.get("KPT_TRITON_TUNED")
    return [*([Path(own)] if own else []), user_folder(), PACKAGED, *_contributed()]


@functools.cache
def _contributed() -> tuple[Path, ...]:
    found = []
    for entry in sorted(entry_points(group="kpt_triton.tables"), key=lambda entry: entry.name):
        package = find_spec(entry.value)
        if package is not None and package.origin is not None:
            found.append(Path(package.origin).parent)
    return tuple(found)


def user_folder() -> Path:
    from platformdirs import user_data_path

    return user_data_path("kpt", appauthor=False) / "triton"


Plan = TypeVar("Plan")
_PLANS: list[Any] = []
#: Called when tables are read again, by those who keep what was planned with the ones before.
FORGETTING: list[Callable[[], None]] = []


def remembered(plan: Callable[..., Plan]) -> Callable[..., Plan]:
    """``plan``, called once for the same (hashable, positional) arguments until tables are read again.

    For what a launch needs beside its tensors: on the way to a short kernel every look-up counts.
    """
    known = functools.lru_cache(maxsize=4096)(plan)
    _PLANS.append(known)

    @functools.wraps(plan)
    def call(*arguments: Any) -> Plan:
        return plan(*arguments) if is_recording() else known(*arguments)

    return call


def forget() -> None:
    """Read the tables again."""
    tables.cache_clear()
    for plan in _PLANS:
        plan.cache_clear()
    for kernel in KERNELS.values():
        kernel.forget()
    for other in FORGETTING:
        other()
