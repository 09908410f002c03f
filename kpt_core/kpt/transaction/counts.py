"""What a model's code counts outside of tensors: in globals, on classes, and in objects that modules hold.

Copies share such places with the user's model, so a plan has to move them as the untouched model does. Code
that was compiled where a counter stood at 16 may leave 17 there for good.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kpt.judge.modelstate import attributes_of, shared_objects
from kpt.transaction.reading import assigned_globals, constants_read, own_bases, reading_of

if TYPE_CHECKING:
    import torch

_NUMBERS = (bool, int, float)
Number = int | float
#: A step of a float carries the rounding of the sum that it was added to.
_ROUNDING = 1e-6


class Counts:
    """The numbers that a call of ``model`` may move, by name."""

    def __init__(self, model: torch.nn.Module) -> None:
        classes = [type(module) for module in model.modules()]
        self._places: list[tuple[str, Callable[[], Mapping[str, Any]], tuple[str, ...]]] = []
        for _, space, names in constants_read(model.modules()):
            self._places.append(("", _constantly(space), tuple(names)))
        for space, assigned in assigned_globals(model.modules()):
            self._places.append(("", _constantly(space), tuple(sorted(assigned))))
        for cls in dict.fromkeys(classes):
            for base in own_bases(cls):
                assigned = reading_of(cls).assigned
                self._places.append((f"{base.__name__}.", _constantly(vars(base)), tuple(sorted(assigned))))
        for value in shared_objects(model):
            if not isinstance(value, (type, types.ModuleType)):
                reader = _attributes_reader(value)
                self._places.append((f"{type(value).__name__}.", reader, tuple(reader())))

    def read(self) -> dict[str, Number]:
        """The numbers as they are now, and the lengths of containers."""
        found: dict[str, Number] = {}
        for number, (prefix, space, names) in enumerate(self._places):
            held = space()
            for name in names:
                for key, value in _numbers(held.get(name)):
                    found[f"{prefix}{name}{key}#{number}"] = value
        return found

    def since(self, before: Mapping[str, Number]) -> dict[str, Number]:
        """By how much each number differs from what it was ``before``; those that do not are left out."""
        return {
            name: _difference(now, before[name])
            for name, now in self.read().items()
            if name in before and not _equal(now, before[name])
        }

    def moved(self, call: Callable[[], Any]) -> dict[str, Number]:
        """By how much ``call()`` moves each number that it moves."""
        before = self.read()
        call()
        return self.since(before)


def plain_name(name: str) -> str:
    """The name of a number in `Counts` without what tells it from others of the same name."""
    return name.rpartition("#")[0]


def same_step(left: Number, right: Number) -> bool:
    """Whether two differences are the same: of integers exactly, of floats up to their rounding."""
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    return _equal(left, right) or _close(left, right)


def spelled(step: Number) -> str:
    """``step`` for a message, however long it is."""
    if isinstance(step, float):
        return f"{step:g}"
    if step.bit_length() <= 64:
        return str(int(step))
    return f"{'-' if step < 0 else ''}2**{step.bit_length() - 1} or more"


def _equal(left: Number, right: Number) -> bool:
    """Equality of numbers, NaN being equal to itself."""
    return left == right or (left != left and right != right)


def _close(left: Number, right: Number) -> bool:
    try:
        return math.isclose(left, right, rel_tol=_ROUNDING)
    except OverflowError:  # an integer beyond all floats
        return False


def _difference(now: Number, before: Number) -> Number:
    try:
        return now - before
    except OverflowError:  # an integer beyond all floats, and a float
        return math.inf if now > before else -math.inf


def _constantly(space: Mapping[str, Any]) -> Callable[[], Mapping[str, Any]]:
    return lambda: space


def _attributes_reader(value: Any) -> Callable[[], Mapping[str, Any]]:
    return lambda: attributes_of(value)


def _numbers(value: Any) -> list[tuple[str, Number]]:
    if isinstance(value, _NUMBERS):
        return [("", _number(value))]
    if type(value) in (list, set, dict):
        inside = [(f"[{k!r}]", _number(v)) for k, v in _items(value) if isinstance(v, _NUMBERS)]
        return [(" (its length)", len(value)), *inside]
    return []


def _number(value: int | float) -> Number:
    """A number that compares and subtracts as Python's own do. Integers stay exact, above 2**53 too."""
    return int(value) if isinstance(value, int) else float(value)


def _items(container: Any) -> list[tuple[Any, Any]]:
    """The items of a short dictionary; those of longer ones and of lists are data."""
    return list(container.items()) if type(container) is dict and len(container) <= 16 else []
