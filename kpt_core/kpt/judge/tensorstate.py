"""One tensor's state before a trial: its memory, bits, gradient, flags and hooks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kpt.judge.bitwise import bits, bitwise_equal, components
from kpt.judge.calls import clone_tensor
from kpt.judge.pieces import CHUNK

_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


@dataclass
class TensorState:
    """One tensor: an alias of its memory, its metadata, and its bits (or their checksum)."""

    name: str
    tensor: torch.Tensor
    alias: torch.Tensor
    copy: torch.Tensor | None
    checksum: int
    requires_grad: bool
    is_leaf: bool
    grad: torch.Tensor | None
    grad_copy: torch.Tensor | None
    grad_checksum: int
    #: The tensor's dictionaries of hooks with what was in them.
    hooks: dict[str, tuple[Any, dict[Any, Any]]]


def _size(tensor: torch.Tensor) -> int:
    if not _has_bits(tensor):
        return 0
    total = sum(part.numel() * part.element_size() for part in components(tensor))
    return total * 2 if tensor.is_leaf and tensor.grad is not None else total


def _has_bits(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "meta" and not isinstance(
        tensor, torch.nn.parameter.UninitializedTensorMixin
    )


def within(named: list[tuple[str, torch.Tensor]], limit_bytes: int | None) -> set[int]:
    """Ids of the tensors that are copied: the smallest first, as far as the limit goes."""
    copied, total = set(), 0
    for _, tensor in sorted(named, key=lambda item: _size(item[1])):
        total += _size(tensor)
        if limit_bytes is not None and total > limit_bytes:
            break
        copied.add(id(tensor))
    return copied


def tensor_state(name: str, tensor: torch.Tensor, copied: bool) -> TensorState:
    """What ``tensor`` is now, its values as a copy or as a checksum."""
    present = _has_bits(tensor)
    grad = tensor.grad if tensor.is_leaf and present else None
    return TensorState(
        name=name,
        tensor=tensor,
        alias=tensor.detach() if present else tensor,
        copy=clone_tensor(tensor.detach()) if copied and present else None,
        checksum=checksum(tensor) if present and not copied else 0,
        requires_grad=tensor.requires_grad,
        is_leaf=tensor.is_leaf,
        grad=grad,
        grad_copy=clone_tensor(grad.detach()) if grad is not None and copied else None,
        grad_checksum=checksum(grad) if grad is not None and not copied else 0,
        hooks={name: _hooks(tensor, name) for name in _TENSOR_HOOKS} if present else {},
    )


def _hooks(tensor: torch.Tensor, name: str) -> tuple[Any, dict[Any, Any]]:
    table = getattr(tensor, name, None)
    return table, dict(table or {})


def checksum(tensor: torch.Tensor) -> int:
    """A position-dependent hash of the bits, computed on the tensor's device in bounded memory."""
    if tensor.layout is not torch.strided:
        return hash(tuple(map(checksum, components(tensor))))
    detached = tensor.detach()
    flat = bits(detached.int_repr() if detached.is_quantized else detached).reshape(-1)
    total = 0
    for start in range(0, flat.numel(), CHUNK):
        piece = flat[start : start + CHUNK].to(torch.int64)
        weights = torch.arange(1, piece.numel() + 1, device=piece.device)
        # Odd multipliers make every bit of every element count; integer sums wrap exactly.
        mixed = int(((piece ^ (piece >> 17)) * (2 * weights + 1) + piece * 0x9E3779B1).sum())
        total = (total * 1_000_003 + mixed) & 0xFFFFFFFFFFFFFFFF
    return total


def tensor_differences(state: TensorState) -> Iterator[str]:
    """What of the tensor differs from ``state`` now."""
    tensor = state.tensor
    if not _has_bits(tensor) or not _has_bits(state.alias):
        if _has_bits(tensor) != _has_bits(state.alias):
            yield "materialised" if _has_bits(tensor) else "released"
        return
    if _moved(state):
        yield "memory, dtype, shape or strides"
    elif not _unchanged(tensor, state.copy, state.checksum):
        yield "values"
    if tensor.requires_grad != state.requires_grad:
        yield "requires_grad"
    if any(_hooks(tensor, name)[1] != before for name, (_, before) in state.hooks.items()):
        yield "hooks"
    if not (state.is_leaf and tensor.is_leaf):
        return
    if tensor.grad is not state.grad:
        had, has = state.grad is not None, tensor.grad is not None
        yield "gradient " + ("replaced" if had and has else "removed" if had else "added")
    elif state.grad is not None and not _unchanged(state.grad, state.grad_copy, state.grad_checksum):
        yield "gradient values"


def _unchanged(tensor: torch.Tensor, copy: torch.Tensor | None, expected: int) -> bool:
    return bitwise_equal(tensor, copy) if copy is not None else checksum(tensor) == expected


def _moved(state: TensorState) -> bool:
    tensor, alias = state.tensor, state.alias
    if tensor.dtype != alias.dtype or tensor.shape != alias.shape or tensor.device != alias.device:
        return True
    if tensor.layout is not torch.strided or type(tensor.detach()) is not torch.Tensor:
        return False  # subclasses keep their memory to themselves
    return tensor.stride() != alias.stride() or tensor.data_ptr() != alias.data_ptr()


def restore_tensor(state: TensorState) -> None:
    """Put the tensor back, as far as its values were copied."""
    tensor = state.tensor
    if not _has_bits(tensor) and not _has_bits(state.alias):
        return
    if _moved(state):
        tensor.data = state.alias
    # Writing through an alias made by `.data` leaves the version counter alone, for those who watch it.
    if state.copy is not None and not bitwise_equal(tensor, state.copy):
        _copy_bits(tensor.data, state.copy)
    if state.is_leaf and not tensor.is_leaf and not tensor._is_view():
        tensor.detach_()  # it was written to where gradients were recorded
    if tensor.is_leaf and tensor.requires_grad != state.requires_grad:
        tensor.requires_grad_(state.requires_grad)
    for name, (table, before) in state.hooks.items():
        if _hooks(tensor, name)[1] != before:
            added = getattr(tensor, name, None)
            if added is not None:
                added.clear()  # torch may go on reading it after it was taken away
            if table is not None:
                table.clear()
                table.update(before)
            setattr(tensor, name, table)
    if state.is_leaf and tensor.is_leaf:
        if tensor.grad is not state.grad:
            tensor.grad = state.grad
        if (
            state.grad is not None
            and state.grad_copy is not None
            and not bitwise_equal(state.grad, state.grad_copy)
        ):
            _copy_bits(state.grad.data, state.grad_copy)


def _copy_bits(target: torch.Tensor, source: torch.Tensor) -> None:
    if target.layout is not torch.strided or target.is_quantized or target.is_complex():
        target.copy_(source)
    else:
        bits(target).copy_(bits(source))
