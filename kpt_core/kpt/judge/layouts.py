"""Memory layouts: give a tensor the strides that another one has, also at another size."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kpt.judge.calls import span


def scaled_strides(sizes: Sequence[int], strides: Sequence[int], new_sizes: Sequence[int]) -> tuple[int, ...]:
    """Strides for ``new_sizes`` in the manner of ``strides`` for ``sizes``.

    The order of the axes, expanded axes (stride 0) and gaps between rows are kept.
    """
    if tuple(sizes) == tuple(new_sizes):
        return tuple(strides)
    result = [0] * len(sizes)
    dense, new_dense = 1, 1
    # Axes of size 1 say nothing about the order; they go by position.
    for axis in sorted(range(len(sizes)), key=lambda axis: (strides[axis], -axis)):
        stride = strides[axis]
        if stride == 0 and sizes[axis] > 1:
            continue
        gap = stride / dense if sizes[axis] > 1 and stride > dense else 1.0
        result[axis] = max(1, round(new_dense * gap))
        dense = max(stride, 1) * sizes[axis] if sizes[axis] > 1 else dense
        new_dense = result[axis] * max(new_sizes[axis], 1)
    return tuple(result)


def laid_out(values: torch.Tensor, strides: Sequence[int], offset: int = 0) -> torch.Tensor:
    """``values`` copied into memory with ``strides``, ``offset`` elements into its storage.

    Along an axis of stride 0 the first entry is repeated.
    """
    if tuple(values.stride()) == tuple(strides) and offset == 0 and values.storage_offset() == 0:
        return values
    buffer = torch.zeros(offset + span(values.shape, strides), dtype=values.dtype, device=values.device)
    result = buffer.as_strided(values.shape, tuple(strides), offset)
    target, source = result, values
    for axis, stride in enumerate(strides):
        if stride == 0 and values.shape[axis] > 1:
            target, source = target.narrow(axis, 0, 1), source.narrow(axis, 0, 1)
    target.copy_(source)
    return result
