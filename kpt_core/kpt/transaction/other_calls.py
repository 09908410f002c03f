"""Other forms in which somebody may make a judged call: in memory that was used before, at odd addresses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from kpt.judge.calls import Call
from kpt.judge.layouts import laid_out

_CONSTANTS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def in_its_memory(call: Call) -> Call:
    """A call with other tensors in the memory of those of ``call``, as a later one may be."""
    return call.map_tensors(lambda tensor: tensor.data.requires_grad_(tensor.requires_grad))


def at_odd_addresses(call: Call) -> Call:
    """A copy of ``call`` whose tensors begin one element into their memory."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided
        if not plain or tensor.is_conj() or tensor.is_neg():
            return tensor
        return laid_out(tensor.detach(), tensor.stride(), offset=1).requires_grad_(tensor.requires_grad)

    return call.clone().map_tensors(move)


def repeats(tensors: Iterable[torch.Tensor]) -> list[int]:
    """For each tensor the place where the same one came first."""
    first: dict[int, int] = {}
    return [first.setdefault(id(tensor), place) for place, tensor in enumerate(tensors)]


def alike(pair: tuple[Any, Any]) -> bool:
    """Whether the calls differ in the values of a tensor at most here: else both are judged apart."""
    old, new = pair
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return old is new or (type(old) is type(new) and isinstance(old, _CONSTANTS) and old == new)
    return (
        old.shape == new.shape
        and old.dtype == new.dtype
        and old.layout is torch.strided
        and not (0 in old.stride() and old.numel())
    )
