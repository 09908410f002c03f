"""Tensors read in pieces of bounded size, in fp64, whatever their dtype, layout and device.

Comparing two large outputs needs no fp64 copy of either, and a sparse one is never made dense.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

#: Elements converted to fp64 at a time (32 MiB per operand).
CHUNK = 1 << 22
_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc)


def _wide(chunk: torch.Tensor) -> torch.Tensor:
    """``chunk`` in fp64 (complex128), on the host if its device has no fp64."""
    wide = torch.complex128 if chunk.is_complex() else torch.float64
    try:
        return chunk.to(wide)
    except (RuntimeError, TypeError):
        return chunk.cpu().to(wide)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of ``tensor`` in one dimension, without history; sparse and quantised ones as plain."""
    detached = tensor.detach()
    if detached.is_quantized:
        detached = detached.dequantize()
    if detached.layout is not torch.strided:
        detached = detached.to_dense()
    return detached.resolve_conj().resolve_neg().reshape(-1)


def _stored(operands: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """The values of sparse operands, side by side, wherever one of them has any.

    There would be no memory for most of them as dense matrices.
    """
    plain = [operand.detach().to_sparse_coo().coalesce() for operand in operands]
    zeros = [
        torch.sparse_coo_tensor(
            each.indices(), torch.zeros_like(each.values()), each.shape, check_invariants=False
        )
        for each in plain
    ]
    found = []
    for each in plain:
        for other in zeros:
            each = each + other.to(each.dtype)
        found.append(each.coalesce().values().reshape(-1))
    return found


def chunks(*operands: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Equal pieces of flattened operands in fp64, on one device; complex numbers become pairs."""
    sparse = all(operand.layout in _SPARSE for operand in operands)
    plain = _stored(operands) if sparse else [flat(operand) for operand in operands]
    for start in range(0, plain[0].numel(), CHUNK):
        pieces = [_wide(operand[start : start + CHUNK]) for operand in plain]
        if len({piece.device for piece in pieces}) > 1:
            pieces = [piece.cpu() for piece in pieces]
        if any(piece.is_complex() for piece in pieces):
            pieces = [torch.view_as_real(piece.to(torch.complex128)) for piece in pieces]
        yield tuple(pieces)


def row_chunks(*operands: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Pieces of whole rows along the last axis, in fp64 on one device."""
    width = operands[0].shape[-1]
    rows = [operand.detach().reshape(-1, width) for operand in operands]
    step = max(1, CHUNK // max(width, 1))
    for start in range(0, rows[0].shape[0], step):
        pieces = [_wide(row[start : start + step]) for row in rows]
        if len({piece.device for piece in pieces}) > 1:
            pieces = [piece.cpu() for piece in pieces]
        yield tuple(pieces)
