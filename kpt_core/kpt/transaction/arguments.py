"""What a plan asks of the arguments of a call: keys to tell calls apart by, and the tensors among them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from kpt.compiling.call_structure import fields_of
from kpt.judge.aliasing import overlap

_Tensor = torch.Tensor

#: In place of the key of an argument that has none.
MISSING = object()


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in an argument of a form that `key_of` knows."""
    if isinstance(value, _Tensor):
        return [value]
    if type(value) in (list, tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    if type(value) is dict:
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    return [tensor for item in (fields_of(value) or {}).values() for tensor in tensors_in(item)]


def share_memory(values: tuple[Any, ...]) -> bool:
    """Whether two tensors among arguments overlap: code that was compiled for others reads what it wrote."""
    tensors = [tensor for value in values for tensor in tensors_in(value)]
    return any(overlap(one, other) for one, other in itertools.combinations(tensors, 2))


def layout_key(tensor: torch.Tensor) -> Any:
    """What a guard asks of a tensor's memory."""
    return tensor.is_contiguous() or tensor.stride(), tensor.is_neg(), tensor.is_conj()


def never_served(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why a guard lets no call with such arguments reach a plan, or None where it may."""
    for name, value in (*enumerate(args), *kwargs.items()):
        if type(value) is not _Tensor and key_of(value) is MISSING:
            return f"argument {name!r} has an unsupported type {type(value).__name__}"
    return None


def key_of(value: Any) -> Any:
    """A hashable stand-in for an argument, or ``MISSING``."""
    if isinstance(value, float):
        return (type(value), value, math.copysign(1.0, value))  # 0.0 and -0.0 are equal
    if isinstance(value, complex):
        return (type(value), value, repr(value))
    if value is None or isinstance(value, (bool, int, str, torch.dtype, torch.device)):
        return (type(value), value)
    if isinstance(value, torch.nn.Parameter) or type(value) is _Tensor:
        return (value.shape, value.dtype, value.device, layout_key(value), value.requires_grad)
    if type(value) in (list, tuple):
        parts = tuple(map(key_of, value))
        return MISSING if MISSING in parts else (type(value), parts)
    if type(value) is dict:
        parts = tuple((k, key_of(v)) for k, v in value.items())
        return MISSING if any(part[1] is MISSING for part in parts) else (dict, parts)
    if (fields := fields_of(value)) is not None:
        parts = tuple(map(key_of, fields.values()))
        return MISSING if MISSING in parts else (type(value), parts)
    return MISSING
