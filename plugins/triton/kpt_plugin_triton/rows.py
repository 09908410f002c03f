"""Tensors as rows: what kernels over the last dimension need to know of a layout."""

from __future__ import annotations

import torch


def rows_of(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """``x`` [..., D] as (tensor, number of rows, elements from one row to the next), columns side by side.

    A view wherever the rows are evenly spaced; otherwise a copy.
    """
    columns = x.shape[-1]
    if x.is_contiguous():
        return x, (x.numel() // columns if columns else 0), columns
    if x.dim() != 2 or x.stride(1) != 1:
        x = x.reshape(-1, columns)
        if x.stride(1) != 1 and columns > 1:
            x = x.contiguous()
    return x, x.shape[0], x.stride(0)


def unit_of(itemsize: int, *counts: int) -> int:
    """The largest power of two that divides all ``counts`` of elements, of at most 16 bytes.

    Triton takes note of numbers that are multiples of 16, and of nothing smaller; kernels that are told their
    unit read 8 elements of 16 bits at once also where a row has 1000.
    """
    together = 0
    for count in counts:
        together |= count
    return min(together & -together, 16 // itemsize) if together else 16 // itemsize


def dense(x: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor like ``x``, contiguous."""
    if x.is_contiguous():
        return torch.empty_like(x)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def contiguous(vector: torch.Tensor | None) -> torch.Tensor | None:
    """``vector`` if its elements lie side by side, else a copy; None stays None."""
    return vector if vector is None or vector.is_contiguous() else vector.contiguous()


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over elements of ``dtype`` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
