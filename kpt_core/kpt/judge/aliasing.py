"""Which tensors share memory, so that a candidate's outputs never alias where eager's do not."""

from __future__ import annotations

from typing import Any

import torch

from kpt.judge import outputs
from kpt.judge.calls import span

#: Interleaved views are compared element by element up to this size, beyond it by their ranges.
_ELEMENTS = 1 << 20


def overlap(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether an element of ``first`` lies in the same memory as one of ``second``."""
    if not _has_storage(first) or not _has_storage(second) or first.device != second.device:
        return False
    start, end = _range(first)
    other_start, other_end = _range(second)
    if start >= other_end or other_start >= end:
        return False
    if first.numel() > _ELEMENTS or second.numel() > _ELEMENTS:
        return True
    return bool(torch.isin(_addresses(first), _addresses(second)).any())


def holders(tensor: torch.Tensor) -> int:
    """How many objects share the memory of ``tensor``, itself included; 0 where that cannot be told."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None or not _has_storage(tensor):
        return 0
    return int(count(tensor.untyped_storage()._cdata))


def _has_storage(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type != "meta" and tensor.numel() > 0


def _range(tensor: torch.Tensor) -> tuple[int, int]:
    """First and past-the-end address in bytes."""
    start = tensor.data_ptr()
    return start, start + span(tensor.shape, tensor.stride()) * tensor.element_size()


def _addresses(tensor: torch.Tensor) -> torch.Tensor:
    """The address of each element, in bytes."""
    addresses = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        steps = torch.arange(size, dtype=torch.int64) * (stride * tensor.element_size())
        addresses = addresses.unsqueeze(-1) + steps
    return addresses.reshape(-1) + tensor.data_ptr()


def new_aliases(candidate: Any, eager: Any, inputs: Any = None, eager_inputs: Any = None) -> str | None:
    """A sentence naming two tensors that share memory in the candidate's run and not in eager's, or None.

    Aliases that eager has and the candidate lacks are no fault: a copy is safe to write to.
    """
    mine, own = outputs.tensors(candidate), outputs.tensors(eager)
    names = list(mine)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            if overlap(mine[name], mine[other]) and not overlap(own[name], own[other]):
                return f"outputs {name} and {other} share memory, unlike in eager mode"
    if inputs is None or eager_inputs is None:
        return None
    given, eager_given = inputs.tensors(), eager_inputs.tensors()
    for name in names:
        for key, tensor in given.items():
            if overlap(mine[name], tensor) and not overlap(own[name], eager_given[key]):
                return f"output {name} shares memory with input {key}, unlike in eager mode"
    return None
