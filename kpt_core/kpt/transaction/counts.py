"""What a model's code counts outside of tensors: in globals, on classes, and in objects that modules hold.

Copies share such places with the user's model, so a plan has to move them as the untouched model does. Code
that was compiled where a counter stood at 16 may leave 17 there for good.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kpt.judge.modelstate import attributes_of, shared_objects
from kpt.transaction.reading import assigned_globals, constants_read, own_bases, reading_of

if TYPE_CHECKING:
    import torch

_NUMBERS = (bool, int, float)


class Counts:
    """The numbers that a call of ``model`` may move, by name."""

    def __init__(self, model: torch.nn.Module) -> None:
        classes = [type(module) for module in model.modules()]
        self._places: list[tuple[str, Callable[[], Mapping[str, Any]], tuple[str, ...]]] = []
        for _, space, names in constants_read(classes):
            self._places.append(("", _constantly(space), tuple(names)))
        for space, assigned in assigned_globals(classes):
            self._places.append(("", _constantly(space), tuple(sorted(assigned))))
        for cls in dict.fromkeys(classes):
            for base in own_bases(cls):
                assigned = reading_of(cls).assigned
                self._places.append((f"{base.__name__}.", _constantly(vars(base)), tuple(sorted(assigned))))
        for value in shared_objects(model):
            if not isinstance(value, (type, types.ModuleType)):
                reader = _attributes_reader(value)
                self._places.append((f"{type(value).__name__}.", reader, tuple(reader())))

    def read(self) -> dict[str, float]:
        """The numbers as they are now, and the lengths of containers."""
        found: dict[str, float] = {}
        for number, (prefix, space, names) in enumerate(self._places):
            held = space()
            for name in names:
                for key, value in _numbers(held.get(name)):
                    found[f"{prefix}{name}{key}#{number}"] = value
        return found

    def moved(self, call: Callable[[], Any]) -> dict[str, float]:
        """By how much ``call()`` moves each number that it moves."""
        before = self.read()
        call()
        return {name: now - before[name] for name, now in self.read().items() if now != before.get(name, now)}


def _constantly(space: Mapping[str, Any]) -> Callable[[], Mapping[str, Any]]:
    return lambda: space


def _attributes_reader(value: Any) -> Callable[[], Mapping[str, Any]]:
    return lambda: attributes_of(value)


def _numbers(value: Any) -> list[tuple[str, float]]:
    if isinstance(value, _NUMBERS):
        return [("", float(value))]
    if type(value) in (list, set, dict):
        inside = [(f"[{k!r}]", float(v)) for k, v in _items(value) if isinstance(v, _NUMBERS)]
        return [(" (its length)", float(len(value))), *inside]
    return []


def _items(container: Any) -> list[tuple[Any, Any]]:
    """The items of a short dictionary; those of longer ones and of lists are data."""
    return list(container.items()) if type(container) is dict and len(container) <= 16 else []
