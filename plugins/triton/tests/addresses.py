"""Which addresses of a kernel come from products that 32 bits may not hold, as Triton's own form shows."""

from __future__ import annotations

import re
from collections.abc import Iterator

#: Products of numbers of rows, heads or programs, by their names in the kernels' source: they never count
#: elements.
COUNTS = frozenset({"first", "of_q", "batch", "all_rows", "place"})
_LINE = re.compile(r"^\s*(?P<name>%\w+)(?::\d+)? = \"?(?P<op>[\w.]+)\"?(?P<rest>.*)$")
_CARRIED = re.compile(r"(%\w+) = (%\w+)")
#: What gives a number of its own: read from memory, or a place among so many, which is smaller than they are.
_BOUNDED = ("tt.load", "tt.reduce", "arith.divsi", "arith.remsi")


def narrow(text: str) -> list[str]:
    """The products of two run-time numbers in 32 bits that go into an address, by their variables' names.

    ``text`` is a kernel in Triton's intermediate form. A product with a constant (a block of so many columns)
    stays in reach; so does a position among rows that were counted in 32 bits.
    """
    definitions: dict[str, tuple[str, list[str], str]] = {}
    for line in text.splitlines():
        for carried, start in _CARRIED.findall(line.partition("iter_args(")[2]):
            definitions.setdefault(carried, ("carried", [start], ""))
        found = _LINE.match(line)
        if found is not None:
            body, _, kind = found["rest"].partition(" loc(")[0].rpartition(" : ")
            definitions[found["name"]] = (found["op"], re.findall(r"%\w+", body), kind)
    wrong = set()
    for op, operands, kind in definitions.values():
        if op == "tt.addptr":
            in_32_bits = re.search(r"\bi32>?\s*$", kind) is not None
            for name in _products(operands[1], definitions):
                variable = re.sub(r"_\d+$", "", name.lstrip("%"))
                if in_32_bits or variable not in COUNTS:
                    wrong.add(variable)
    return sorted(wrong)


def _products(start: str, definitions: dict[str, tuple[str, list[str], str]]) -> Iterator[str]:
    """The 32-bit products of run-time numbers among what ``start`` is computed from."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        op, operands, kind = definitions.get(name, ("", [], ""))
        if name in seen or op in _BOUNDED:
            continue
        seen.add(name)
        if op == "arith.muli" and "i64" not in kind and not any(_constant(o, definitions) for o in operands):
            yield name
        waiting += operands


def _constant(name: str, definitions: dict[str, tuple[str, list[str], str]]) -> bool:
    op, operands, _ = definitions.get(name, ("", [], ""))
    if op in ("tt.splat", "tt.expand_dims", "tt.broadcast"):
        return _constant(operands[0], definitions)
    return op == "arith.constant"
