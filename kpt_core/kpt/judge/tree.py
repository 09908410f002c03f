"""Walk and rebuild the nested values that models take and return.

torch's own pytree knows neither plain dataclasses nor the output and cache classes that model
libraries define, so the walk is by what a value offers: a mapping, a sequence, dataclass fields, or
the attributes of an object that holds tensors.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

Path = tuple[Any, ...]

#: Values that are shared between copies, since nothing can change them.
_ATOMS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    enum.Enum,
    type,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.Size,
    torch.nn.Module,
    torch.Generator,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
)
#: How deep attributes of foreign objects are searched for tensors (a cache holds layers, which hold tensors).
_DEPTH = 6


def is_atom(value: Any) -> bool:
    """Whether ``value`` is immutable, or an identity (a module, a function) rather than data."""
    return isinstance(value, _ATOMS)


def holds_tensors(value: Any, depth: int = _DEPTH) -> bool:
    """Whether a tensor is found in ``value`` within ``depth`` levels."""
    if isinstance(value, torch.Tensor):
        return True
    if depth <= 0 or is_atom(value):
        return False
    items = children(value)
    if items is None:
        attributes = getattr(value, "__dict__", None)
        items = list(attributes.items()) if attributes else []
    return any(holds_tensors(child, depth - 1) for _, child in items)


def children(value: Any) -> list[tuple[Any, Any]] | None:
    """The named parts of a container, or None for anything that is not one."""
    if isinstance(value, (torch.Tensor, str, bytes)) or is_atom(value):
        return None
    if isinstance(value, Mapping):
        return list(value.items())
    if dataclasses.is_dataclass(value):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    return None


def _parts(value: Any, depth: int) -> tuple[list[tuple[Any, Any]], bool] | None:
    """The parts of ``value`` and whether they are attributes of a foreign object."""
    items = children(value)
    if items is not None:
        return items, False
    if depth > 0 and not is_atom(value) and not isinstance(value, torch.Tensor):
        attributes = getattr(value, "__dict__", None)
        if attributes and holds_tensors(value, depth):
            return list(attributes.items()), True
    return None


def walk(value: Any, path: Path = (), depth: int = _DEPTH) -> Iterator[tuple[Path, Any]]:
    """Yield ``(path, leaf)`` in a stable order. An attribute of a foreign object is a leaf only if it
    is a tensor, holds tensors, or is a plain number, flag or string: caches carry private state too.
    """
    parts = _parts(value, depth)
    if parts is None:
        yield path, value
        return
    items, foreign = parts
    for key, child in items:
        if foreign and not (isinstance(child, (int, float, bool, str)) or holds_tensors(child, depth - 1)):
            continue
        yield from walk(child, (*path, key), depth - 1 if foreign else depth)


def rebuild(value: Any, change: Callable[[Path, Any], Any], path: Path = (), depth: int = _DEPTH) -> Any:
    """A copy of ``value`` of the same types, with every leaf replaced by ``change(path, leaf)``."""
    parts = _parts(value, depth)
    if parts is None:
        return change(path, value)
    items, foreign = parts
    deeper = depth - 1 if foreign else depth
    changed = [(key, rebuild(child, change, (*path, key), deeper)) for key, child in items]
    if foreign:
        duplicate = _duplicate(value)
        duplicate.__dict__.update(changed)
        return duplicate
    if isinstance(value, tuple):
        values = [child for _, child in changed]
        return type(value)(*values) if hasattr(value, "_fields") else type(value)(values)
    if type(value) is list or type(value) is dict:
        return [child for _, child in changed] if type(value) is list else dict(changed)
    if isinstance(value, list):
        duplicate = copy.copy(value)
        duplicate[:] = [child for _, child in changed]
        return duplicate
    if isinstance(value, Mapping):
        return _rebuild_mapping(value, changed)
    duplicate = _duplicate(value)
    for key, child in changed:
        object.__setattr__(duplicate, key, child)
    return duplicate


def _duplicate(value: Any) -> Any:
    """A shallow copy; what takes itself for immutable (its copy is itself) is copied all the same."""
    duplicate = copy.copy(value)
    if duplicate is value:
        duplicate = object.__new__(type(value))
        if hasattr(value, "__dict__"):
            duplicate.__dict__.update(vars(value))
    return duplicate


def _rebuild_mapping(value: Mapping[Any, Any], changed: list[tuple[Any, Any]]) -> Any:
    duplicate: Any = copy.copy(value)
    data = getattr(duplicate, "data", None)
    if isinstance(data, dict) and not isinstance(value, dict):  # UserDict: copy.copy may share its dict
        duplicate.data = dict(data)
    try:
        for key, child in changed:
            duplicate[key] = child
    except TypeError:  # an immutable mapping
        return type(value)(dict(changed))  # type: ignore[call-arg]
    return duplicate


def structure(value: Any, depth: int = _DEPTH) -> Any:
    """A hashable description of the containers in ``value``: their types and keys, leaves left out."""
    parts = _parts(value, depth)
    if parts is None:
        return "tensor" if isinstance(value, torch.Tensor) else "none" if value is None else "leaf"
    items, foreign = parts
    if foreign:
        items = [(key, child) for key, child in items if holds_tensors(child, depth - 1)]
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    return name, tuple((key, structure(child, depth - 1 if foreign else depth)) for key, child in items)


def spell(path: Path) -> str:
    """``("past", 0, "keys")`` as ``past[0].keys``; the empty path as ``output``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "output"
