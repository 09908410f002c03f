"""Equality of tensors to the bit."""

from __future__ import annotations

import torch

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bitwise_equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether dtype, shape and every bit agree (NaN equals a NaN of the same payload, 0 is not -0)."""
    if first.dtype != second.dtype or first.shape != second.shape or first.layout != second.layout:
        return False
    if first.device.type == "meta":
        return True
    if first.layout is not torch.strided:
        mine, yours = components(first), components(second)
        return len(mine) == len(yours) and all(map(bitwise_equal, mine, yours))
    if first.is_quantized:
        return torch.equal(first, second)
    return torch.equal(bits(first), bits(second.to(first.device)))


_ROWS = (torch.sparse_csr, torch.sparse_bsr)
_COLUMNS = (torch.sparse_csc, torch.sparse_bsc)


def components(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The strided tensors that hold what ``tensor`` holds: of a sparse one its indices and values.

    Dense, a sparse tensor may fill the memory.
    """
    detached = tensor.detach()
    if detached.layout is torch.strided:
        return (detached,)
    if detached.layout is torch.sparse_coo:
        return detached._indices(), detached._values()
    if detached.layout in _ROWS:
        return detached.crow_indices(), detached.col_indices(), detached.values()
    if detached.layout in _COLUMNS:
        return detached.ccol_indices(), detached.row_indices(), detached.values()
    return (detached.to_dense(),)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers (a view where possible, of the same shape or one axis more)."""
    detached = tensor.detach().resolve_conj().resolve_neg()
    if detached.is_complex():
        detached = torch.view_as_real(detached)
    width = _BITS.get(detached.element_size())
    return detached if width is None or detached.dtype == width else detached.view(width)
