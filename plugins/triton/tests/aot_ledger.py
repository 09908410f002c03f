"""What launches compiled to before, so that those which nothing has changed for are not compiled again.

Cold, two cores take twenty minutes for what one run of the tests wants compiled. An entry of
tests/aot_ledger/<architecture>.json stands for one launch on one Triton: its key is made of the kernel's
source with all that it calls, of what decides how a launch compiles, and of the version of Triton. A launch
without an entry is compiled, and so is one of sixteen with one, which has to come out as that says.

``make ledger`` (KPT_AOT_LEDGER=write) deletes all entries, compiles what the tests ask for and notes it anew.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import addresses
import aot_sample
import triton

from kpt_plugin_triton import aot
from kpt_plugin_triton.launch import Launch

FOLDER = Path(__file__).with_name("aot_ledger")
#: One of so many known launches is compiled all the same.
VERIFIED = 16
VARIABLE = "KPT_AOT_LEDGER"
Name = TypeVar("Name")


def writing() -> bool:
    """Whether everything is compiled, and noted.

    Raises:
        ValueError: the variable has a value of no meaning.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "write"):
        raise ValueError(f"{VARIABLE} is {asked!r}; supported: write, or not set")
    return asked == "write"


@dataclass(frozen=True)
class Compiled:
    """What the tests ask of a compiled launch: what it needs, and products taken in 32 bits."""

    used: aot.Resources
    narrow: list[str]


def compiled(launches: Iterable[tuple[Name, Launch]], target: str) -> Iterator[tuple[Name, Launch, Compiled]]:
    """Each launch with what it compiles to; two at a time, as LLVM and the assembler let go of Python's lock.

    Raises:
        AssertionError: a known launch compiles to something else than its entry says.
    """
    wanted = list(launches)
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda item: _one(item[1], target), wanted)
        yield from ((name, launch, result) for (name, launch), result in zip(wanted, found))


def _one(launch: Launch, target: str) -> Compiled:
    key = key_of(launch, target)
    known = None if writing() else _entries(target).get(key)
    if known is not None and not _verified(key):
        counted["known"] += 1
        return _read(known, target)
    counted["compiled"] += 1
    made = aot.compile_for(launch, aot.target_of(target))
    form = "ttir" if "ttir" in made.asm else "source"  # Gluon's has one form less
    result = Compiled(aot.resources(made, target), sorted(addresses.narrow(made.asm[form])))
    if known is not None:
        assert _read(known, target) == result, (
            f"{result.used.name} on {target} compiles to {result}, its entry says {known}; "
            f"delete {FOLDER / target}.json, or write it anew: make ledger"
        )
    if writing():
        _keep(target, key, result)
    return result


def key_of(launch: Launch, target: str) -> str:
    """Changes with whatever may change what a launch compiles to, or what of that an entry holds.

    Triton's key of a function covers its source, the functions that it calls and the globals that it reads;
    not what its decorator says.
    """
    function, *rest = aot.describe(launch)
    marks = [
        (each.name, each.do_not_specialize, each.do_not_specialize_on_alignment) for each in function.params
    ]
    said = triton.__version__, target, function.cache_key, function.noinline, marks, *rest
    text = "\n".join(str(each) for each in (*said, _own_code()))
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


@functools.cache
def _own_code() -> str:
    """A hash of the code that compiles launches and reads what they compiled to."""
    files = (Path(str(file)) for file in (aot.__file__, addresses.__file__, __file__))
    return hashlib.blake2b(b"".join(file.read_bytes() for file in files)).hexdigest()


def _verified(key: str) -> bool:
    return (int(key, 16) + aot_sample.seed_number()) % VERIFIED == 0


@functools.cache
def _entries(target: str) -> dict[str, list[Any]]:
    path = FOLDER / f"{target}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _read(entry: list[Any], target: str) -> Compiled:
    name, shared, registers, spilled, matrix, products, narrow = entry
    return Compiled(
        aot.Resources(
            name, target, shared, registers, spilled, matrix, tuple(aot.Product(*each) for each in products)
        ),
        narrow,
    )


#: Launches of this process, for the report of a run of the tests.
counted = {"known": 0, "compiled": 0}
_kept: dict[str, dict[str, list[Any]]] = {}
_lock = threading.Lock()


def _keep(target: str, key: str, result: Compiled) -> None:
    used = result.used
    products = [list(asdict(each).values()) for each in used.products]
    entry = [used.name, used.shared, used.registers, used.spilled, used.matrix, products, result.narrow]
    with _lock:
        if not _kept:
            atexit.register(_write)
        _kept.setdefault(target, {})[key] = entry


def _write() -> None:
    FOLDER.mkdir(exist_ok=True)
    for target, fresh in _kept.items():
        entries = {**_entries(target), **fresh}
        lines = [f'"{key}": {json.dumps(entry)}' for key, entry in sorted(entries.items())]
        (FOLDER / f"{target}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
