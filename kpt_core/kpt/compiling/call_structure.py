"""What compiled code depends on in the arguments of a call, and its tensors by name."""

from __future__ import annotations

import collections
import copy
import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch

_TENSORS = (torch.Tensor, torch.nn.Parameter)
_SCALARS = (int, float, bool, str, complex, type(None), torch.dtype, torch.device)
_grad_enabled = torch.is_grad_enabled
_inference_enabled = torch.is_inference_mode_enabled

#: In place of -0.0, which is equal to 0.0, and of which the inverse is not.
_NEGATIVE_ZERO = "-0.0"


#: What a dataclass that inherits from it holds beside its fields.
_HOLDERS = (list, dict, set, frozenset, collections.deque, str, bytes, int, float, complex)


def _is_negative_zero(value: Any) -> bool:
    return type(value) is float and value == 0.0 and math.copysign(1.0, value) < 0.0


def fields_of(value: Any) -> dict[str, Any] | None:
    """The parts of a named tuple or a dataclass by name.

    None for all else, and for those that hold more or less than their fields (a cached property, slots, the
    items of a list).
    """
    if isinstance(value, (type, Mapping, torch.Tensor, torch.nn.Module, *_HOLDERS)):
        return None
    held: dict[str, Any] = getattr(value, "__dict__", {})
    if isinstance(value, tuple):
        names = getattr(type(value), "_fields", ())
        return dict(zip(names, value)) if names and len(names) == len(value) and not held else None
    if not dataclasses.is_dataclass(value):
        return None
    names = tuple(field.name for field in dataclasses.fields(value))
    return {name: held[name] for name in names} if held.keys() == set(names) else None


def with_fields(value: Any, fields: dict[str, Any]) -> Any:
    """One like ``value`` with these `fields_of` it, made without the code that checks or derives fields."""
    if isinstance(value, tuple):
        return tuple.__new__(type(value), fields.values())
    duplicate = copy.copy(value)
    duplicate.__dict__.update(fields)
    return duplicate


def negative_zeros(value: Any, path: tuple[Any, ...] = ()) -> frozenset[tuple[Any, ...]]:
    """Where in the arguments of a call -0.0 is."""
    if fields := fields_of(value):
        items: Any = fields.items()
    elif isinstance(value, (tuple, list)):
        items = enumerate(value)
    elif isinstance(value, dict):
        items = value.items()
    else:
        return frozenset({path}) if _is_negative_zero(value) else frozenset()
    return frozenset().union(*(negative_zeros(item, (*path, key)) for key, item in items))


def _structure(value: Any, parts: list[Any], identities: list[int]) -> bool:
    """Append to ``parts`` what compiled code depends on in ``value``; False if that isn't known."""
    kind = type(value)
    if kind in _TENSORS:
        identities.append(id(value))
        parts.append(value.shape)
        parts.append(value.stride())
        parts.append(value.dtype)
        parts.append(value.requires_grad)
        parts.append(value.device)
        # Memory holds the conjugate, or the negative, of the values.
        parts.append((value.is_conj(), value.is_neg()))
        return True
    parts.append(kind)
    if kind in _SCALARS:
        parts.append(_NEGATIVE_ZERO if _is_negative_zero(value) else value)
        return True
    if kind is tuple or kind is list:
        parts.append(len(value))
        return all(_structure(item, parts, identities) for item in value)
    if kind is dict:
        parts.append(tuple(value))
        return all(_structure(item, parts, identities) for item in value.values())
    if (fields := fields_of(value)) is not None:
        return all(_structure(item, parts, identities) for item in fields.values())
    return False


def structure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """A hashable description of a call, or None when an argument has a type unknown here."""
    parts: list[Any] = [_grad_enabled(), _inference_enabled(), len(args)]
    identities: list[int] = []
    for value in args:
        if not _structure(value, parts, identities):
            return None
    for name, value in kwargs.items():
        parts.append(name)
        if not _structure(value, parts, identities):
            return None
    if len(identities) > 1 and len(set(identities)) != len(identities):
        # The same tensor twice: compiled code may be specialised to which ones are equal.
        parts.append(tuple(identities.index(identity) for identity in identities))
    return tuple(parts)


def named_tensors(
    signature: inspect.Signature | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The tensors of a call by name, spelt as an input spec does: ``mask``, ``past[0].keys``."""
    found: dict[str, torch.Tensor] = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif fields := fields_of(value):
            for key, item in fields.items():
                visit(f"{name}.{key}", item)
        elif isinstance(value, (tuple, list)):
            for index, item in enumerate(value):
                visit(f"{name}[{index}]", item)
        elif isinstance(value, dict):
            for key, item in value.items():
                visit(f"{name}[{key}]" if isinstance(key, int) else f"{name}.{key}", item)

    arguments: Mapping[str, Any] = kwargs
    if args:
        arguments = {str(index): value for index, value in enumerate(args)} | kwargs
        if signature is not None:
            arguments = {}
            for name, value in signature.bind(*args, **kwargs).arguments.items():
                if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                    arguments |= value
                else:
                    arguments[name] = value
    for name, value in arguments.items():
        visit(name, value)
    return found
