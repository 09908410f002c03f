"""Which sizes are a module's own and which the call's, and smaller ones in the same proportions."""

from __future__ import annotations

from typing import Any

import torch

from kpt.ops.captured import Captured, Seen, seen_in
from kpt.ops.hypotheses import class_functions
from kpt.ops.mentions import names_mentioned

#: Elements of parameters above which dimensions are shrunk.
BIG = 1 << 18
_LEAST = 32  # a table of positions keeps more rows than a small sequence has
_ENOUGH = 1 << 12  # rows of a table are no better proof than that


def sizes_of_call(seen: Seen) -> tuple[int, ...]:
    """The sizes that a call may choose: the last axis is features, except that of labels or tokens."""
    return seen.shape if is_integer(seen.dtype) else seen.shape[:-1]


def is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def own_sizes(captured: Captured) -> set[int]:
    """Sizes that belong to the module: of its parameters, and integers that it or its config holds.

    A config holds much that this module never looks at. A sequence as long as the longest that the model
    takes is like any other to code that does not know of that limit, and costs its square to prove.
    """
    module = captured.module
    found = {size for p in (*module.parameters(), *module.buffers()) for size in p.shape}
    configs: list[dict[str, Any]] = []
    for inner in module.modules():
        for value in vars(inner).values():
            if type(value) is int:
                found.add(value)
            elif hasattr(value, "__dict__") and not callable(value):
                configs.append(vars(value))
    methods = [function for cls in {type(m) for m in module.modules()} for function in class_functions(cls)]
    held = [
        value for inner in module.modules() for value in vars(inner).values() if hasattr(value, "__dict__")
    ]
    read = names_mentioned([*methods, *held, captured.function], held)
    sequences = _sequences(captured) if captured.function is not None else set()
    for config in configs:
        numbers = {name: value for name, value in config.items() if type(value) is int}
        found.update(value for name, value in numbers.items() if name in read or value not in sequences)
    return found


def _sequences(captured: Captured) -> set[int]:
    """Lengths of the sequences in (batch, heads, length, features) where nothing else is of that size."""
    given = [seen for call in captured.calls for seen in seen_in(call)]
    shapes = [seen.shape for seen in given if seen.dtype.is_floating_point]
    four = [shape for shape in shapes if len(shape) == 4]
    others = {size for shape in four for size in (*shape[:2], shape[-1])}
    return {shape[2] for shape in four} - others


def shrunk(sizes: set[int]) -> dict[int, int]:
    """Smaller sizes in the same proportions, so that fused and split matrices still fit each other."""
    for factor in (64, 32, 16, 8, 4, 2):
        if all(size % factor == 0 and _LEAST <= size // factor <= _ENOUGH for size in sizes):
            return {size: size // factor for size in sizes}
    found: dict[int, int] = {}
    fresh = iter(range(_LEAST + 1, 4096, 2))
    for size in sorted(sizes):
        half = size // 2
        found[size] = 2 * found[half] if size % 2 == 0 and half in found else next(fresh)
    return found
