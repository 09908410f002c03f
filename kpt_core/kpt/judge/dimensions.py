"""Named dynamic dimensions: how a user declares them and which sizes they may take."""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: An undeclared upper bound is this many times the largest size among the examples.
_GROWTH = 2
#: Bounds beyond this are torch.export's "no bound".
_UNBOUNDED = 1 << 31


@dataclass(frozen=True)
class Dimension:
    """A named size that changes from call to call.

    ``low`` and ``high`` are inclusive; ``declared`` says whether the user gave the upper bound.
    ``observed`` are the sizes among the examples, ascending.
    """

    name: str
    low: int
    high: int
    observed: tuple[int, ...]
    declared: bool = False

    def __contains__(self, size: int) -> bool:
        return self.low <= size <= self.high

    def to_dict(self) -> dict[str, Any]:
        """The dimension as JSON values."""
        return {
            "name": self.name,
            "low": self.low,
            "high": self.high,
            "observed": list(self.observed),
            "declared": self.declared,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Dimension:
        """The inverse of `to_dict`."""
        return cls(data["name"], data["low"], data["high"], tuple(data["observed"]), data["declared"])


@dataclass(frozen=True)
class Declaration:
    """What was declared for one axis: a name, and bounds where given."""

    name: str
    low: int | None = None
    high: int | None = None


def declared_axes(
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None,
    ranks: Mapping[str, int],
    positional: Sequence[str] = (),
) -> dict[str, dict[int, Declaration]]:
    """Resolve ``dynamic_shapes`` to declarations by leaf name and axis.

    ``ranks`` gives every tensor input's rank by name, ``positional`` the parameter names that a
    sequence (torch.export's other form) lines up with. An axis's value is a name, an object with
    ``__name__``, ``min`` and ``max`` such as torch.export.Dim, or ``(name, min, max)``; None is static.

    Raises:
        ValueError: an unknown input or axis, naming the known ones, or a value of another kind.
    """
    if not dynamic_shapes:
        return {}
    if not isinstance(dynamic_shapes, Mapping):
        if len(dynamic_shapes) > len(positional):
            raise ValueError(
                f"dynamic_shapes has {len(dynamic_shapes)} entries for {len(positional)} inputs "
                f"({', '.join(positional)}); pass a dict by input name"
            )
        dynamic_shapes = dict(zip(positional, dynamic_shapes, strict=False))
    found: dict[str, dict[int, Declaration]] = {}
    for name, axes in dynamic_shapes.items():
        _resolve(str(name), axes, ranks, found)
    return {name: axes for name, axes in found.items() if axes}


def _resolve(
    name: str, axes: Any, ranks: Mapping[str, int], found: dict[str, dict[int, Declaration]]
) -> None:
    if axes is None:
        return
    if name not in ranks:
        nested = sorted(known for known in ranks if known.startswith((f"{name}.", f"{name}[")))
        if not nested:
            raise ValueError(
                f"dynamic_shapes names {name!r}, which is no tensor input; the inputs are {', '.join(ranks)}"
            )
        parts = axes.items() if isinstance(axes, Mapping) else enumerate(axes)
        for key, inner in parts:
            _resolve(f"{name}[{key}]" if isinstance(key, int) else f"{name}.{key}", inner, ranks, found)
        return
    if not isinstance(axes, Mapping):
        if isinstance(axes, str) or not isinstance(axes, Sequence):
            raise ValueError(
                f"dynamic_shapes[{name!r}] is {axes!r}; expected a dict from axis to dimension, "
                'for instance {0: "batch", 1: "sequence"}'
            )
        axes = dict(enumerate(axes))
    rank = ranks[name]
    for axis, entry in axes.items():
        if not isinstance(axis, int) or not -rank <= axis < rank:
            raise ValueError(
                f"dynamic_shapes[{name!r}] names axis {axis!r}, but {name} has {rank} axes (0 to {rank - 1})"
            )
        declaration = _declaration(name, axis % rank, entry)
        if declaration is not None:
            found.setdefault(name, {})[axis % rank] = declaration


def _declaration(name: str, axis: int, entry: Any) -> Declaration | None:
    if entry is None or (isinstance(entry, int) and not isinstance(entry, bool)):
        return None  # torch.export: a number or None is a static size
    if isinstance(entry, str):
        return Declaration(entry)
    if (
        isinstance(entry, (tuple, list))
        and len(entry) == 3
        and isinstance(entry[0], str)
        and all(bound is None or hasattr(bound, "__index__") for bound in entry[1:])
    ):
        low, high = (None if bound is None else operator.index(bound) for bound in entry[1:])
        if low is not None and high is not None and low > high:
            raise ValueError(f"dimension {entry[0]!r} of {name} has the empty range {low}..{high}")
        return Declaration(entry[0], low, high)
    if type(entry).__name__ == "_DimHint":
        hint = str(getattr(getattr(entry, "type", None), "name", entry))
        return None if "STATIC" in hint else Declaration(f"{name}.{axis}")
    label = getattr(entry, "__name__", None)
    if isinstance(label, str) and hasattr(entry, "min") and hasattr(entry, "max"):
        if hasattr(entry, "root"):
            raise ValueError(
                f"dynamic_shapes[{name!r}][{axis}] is the derived dimension {label}; "
                "give the axis a name of its own"
            )
        return Declaration(label, _bound(entry.min), _bound(entry.max))
    raise ValueError(
        f"dynamic_shapes[{name!r}][{axis}] is {entry!r}; expected a name, a torch.export.Dim, "
        "(name, min, max), or None for a static axis"
    )


def _bound(value: Any) -> int | None:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError, AttributeError):
        return None  # torch.export's infinity of sympy's makes no number, in one way or another
    return number if 0 < number < _UNBOUNDED else None


def observe_dimensions(
    declared: Mapping[str, Mapping[int, Declaration]], examples: Sequence[Mapping[str, Sequence[int]]]
) -> dict[str, Dimension]:
    """The dimensions by name. ``examples`` gives each example's shapes by leaf name.

    Raises:
        ValueError: one name has two sizes in one example or two ranges, or a size lies outside its range.
    """
    bounds: dict[str, Declaration] = {}
    sizes: dict[str, set[int]] = {}
    for leaf, axes in declared.items():
        for axis, declaration in axes.items():
            name = declaration.name
            known = bounds.setdefault(name, declaration)
            for mine, theirs in ((known.low, declaration.low), (known.high, declaration.high)):
                if mine is not None and theirs is not None and mine != theirs:
                    raise ValueError(
                        f"dimension {name!r} is declared with two ranges; the second is on {leaf} axis {axis}"
                    )
            bounds[name] = Declaration(
                name,
                known.low if known.low is not None else declaration.low,
                known.high if known.high is not None else declaration.high,
            )
    for number, shapes in enumerate(examples):
        seen: dict[str, tuple[int, str, int]] = {}
        for leaf, axes in declared.items():
            if leaf not in shapes:
                continue
            for axis, declaration in axes.items():
                size = shapes[leaf][axis]
                other = seen.setdefault(declaration.name, (size, leaf, axis))
                if other[0] != size:
                    raise ValueError(
                        f"dimension {declaration.name!r} is {other[0]} in {other[1]} (axis {other[2]}) but "
                        f"{size} in {leaf} (axis {axis}) of example {number}; give them different names"
                    )
                sizes.setdefault(declaration.name, set()).add(size)
    return {name: _dimension(bounds[name], sorted(observed)) for name, observed in sizes.items()}


def _dimension(declaration: Declaration, observed: list[int]) -> Dimension:
    low = declaration.low if declaration.low is not None else min(1, observed[0])
    high = declaration.high if declaration.high is not None else max(_GROWTH * observed[-1], low)
    if observed[0] < low or observed[-1] > high:
        raise ValueError(
            f"dimension {declaration.name!r} is declared as {low}..{high}, but the examples have "
            f"{', '.join(map(str, observed))}"
        )
    return Dimension(declaration.name, low, high, tuple(observed), declaration.high is not None)


def drawn_sizes(dimensions: Iterable[Dimension], number: int, choose: random.Random) -> list[dict[str, int]]:
    """At most ``number`` distinct assignments: odd ones, then one dimension at a time at its bounds."""
    known = list(dimensions)
    if not known:
        return []
    found: list[dict[str, int]] = []
    for attempt in range(4 * number + 4):
        if len(found) == number:
            break
        sizes = {dimension.name: _odd(dimension, choose) for dimension in known}
        if attempt:
            bounded = known[(attempt - 1) // 2 % len(known)]
            if attempt <= 2 * len(known):
                sizes[bounded.name] = bounded.low if attempt % 2 else bounded.high
        if sizes not in found:
            found.append(sizes)
    return found


def proportional_sizes(
    dimensions: Iterable[Dimension], examples: Iterable[Mapping[str, int]]
) -> list[dict[str, int]]:
    """Assignments in which all sizes are to each other as in the largest example, within their ranges.

    ``examples`` gives each example's sizes by dimension; what the largest lacks is its largest elsewhere.
    """
    known, found = list(dimensions), []
    sizes = {d.name: d.observed[-1] for d in known}
    largest = max(examples, key=lambda example: math.prod(example.values()), default=None)
    sizes.update(largest or {})
    for times, parts in ((2, 1), (1, 2), (3, 2), (3, 1), (1, 4)):
        if all(sizes[d.name] * times % parts == 0 and sizes[d.name] * times // parts in d for d in known):
            found.append({d.name: sizes[d.name] * times // parts for d in known})
    return found


def _odd(dimension: Dimension, choose: random.Random) -> int:
    """A random odd size, not beyond what was observed: two dimensions at their bounds cost too much."""
    low, high = dimension.low, max(min(dimension.high, dimension.observed[-1] + 1), dimension.low)
    odd = [size for size in (choose.randint(low, high) | 1 for _ in range(4)) if size <= high]
    return odd[0] if odd else low
