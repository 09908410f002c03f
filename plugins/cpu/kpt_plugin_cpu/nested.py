"""Tensors inside what models take and return, changed in copies of what holds them. Dynamo can trace it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from kpt_plugin_cpu.attributes import attributes

#: How deep tensors are looked for inside objects (a cache of layers of keys).
_DEPTH = 4


def changed(value: Any, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
    """``value`` with each tensor for which ``change`` gives another one replaced by it.

    What holds such a tensor (a list, a dictionary, a dataclass, any other object) is copied: the model may
    keep it. Everything else is the object that it was.
    """
    return _inside(value, change, _DEPTH)[0]


def _inside(
    value: Any, change: Callable[[torch.Tensor], torch.Tensor | None], depth: int
) -> tuple[Any, bool]:
    """`changed`, and whether anything was: dynamo of torch 2.11 can't ask whether it is the same."""
    if isinstance(value, torch.Tensor):
        new = change(value)
        return (value, False) if new is None else (new, True)
    if depth == 0 or value is None or isinstance(value, (int, float, str, bytes, torch.nn.Module, type)):
        return value, False
    if isinstance(value, (list, tuple)):
        items = [_inside(item, change, depth - 1) for item in value]
        if not any(differs for _, differs in items):
            return value, False
        parts = [item for item, _ in items]
        return (type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)), True
    held = value if isinstance(value, dict) else attributes(value)
    found = {}
    for name, item in list(held.items()):
        if isinstance(item, (list, tuple, dict)) or not callable(item):  # dynamo can't ask it of these
            new, differs = _inside(item, change, depth - 1)
            if differs:
                found[name] = new
    if not found:
        return value, False
    if type(value) is dict:
        return {**value, **found}, True
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update(found)
        return copied, True
    cls: Any = type(value)
    try:
        twin = object.__new__(cls)
    except TypeError:  # laid out by a base that is not Python's
        twin = cls.__new__(cls)
    for name, item in list(held.items()):
        # A frozen dataclass refuses what goes through its own interface.
        object.__setattr__(twin, name, found.get(name, item))
    return twin, True
