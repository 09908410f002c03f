"""Tensors that modules hold in lists, tables and plain objects: not registered, and frozen by compilers."""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch

#: How deep they are looked for, and in how many containers of one module.
_DEPTH, _MOST = 4, 10_000
#: What every module has for itself.
_OWN = frozenset(vars(torch.nn.Module()))
_OTHERS = (torch.nn.Module, torch.Tensor, FunctionType, ModuleType, type, str, bytes, int, float, complex)


def tensors_inside(module: torch.nn.Module) -> Iterator[tuple[Any, Any, torch.Tensor, int | None]]:
    """(container, key or attribute, tensor, its version where torch counts them) for each of them."""
    seen: set[int] = set()
    waiting = [(value, 1) for name, value in vars(module).items() if name not in _OWN]
    while waiting and len(seen) < _MOST:
        container, depth = waiting.pop()
        if container is None or isinstance(container, _OTHERS) or id(container) in seen:
            continue
        seen.add(id(container))
        for key, value in _items(container):
            if isinstance(value, torch.Tensor):
                yield container, key, value, None if value.is_inference() else value._version
            elif depth < _DEPTH:
                waiting.append((value, depth + 1))


def item(container: Any, key: Any) -> Any:
    """What is under ``key`` now, or None."""
    try:
        return container[key] if isinstance(container, (list, tuple, dict)) else vars(container).get(key)
    except (KeyError, IndexError, TypeError):
        return None


def _items(container: Any) -> list[tuple[Any, Any]]:
    if isinstance(container, dict):
        return list(container.items())
    if isinstance(container, (list, tuple)):
        return list(enumerate(container))
    state = getattr(container, "__dict__", None)
    return list(state.items()) if type(state) is dict else []
