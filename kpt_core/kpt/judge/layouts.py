"""Memory layouts: give a tensor the strides that another one has, also at another size."""

from __future__ import annotations

import math
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


def laid_out(values: torch.Tensor, strides: Sequence[int], offset: int = 0, gap: float = 0.0) -> torch.Tensor:
    """``values`` copied into memory with ``strides``, ``offset`` elements into its storage.

    Along an axis of stride 0 the first entry is repeated; memory between elements holds ``gap``.
    """
    if tuple(values.stride()) == tuple(strides) and offset == 0 and values.storage_offset() == 0:
        return values
    length = offset + span(values.shape, strides)
    # As many elements again behind the last one, for a kernel that reads past the end.
    buffer = torch.zeros(length + (length if gap else 0), dtype=values.dtype, device=values.device)
    if gap and values.is_floating_point():
        buffer.fill_(gap)
    result = buffer.as_strided(values.shape, tuple(strides), offset)
    target, source = result, values
    for axis, stride in enumerate(strides):
        if stride == 0 and values.shape[axis] > 1:
            target, source = target.narrow(axis, 0, 1), source.narrow(axis, 0, 1)
    target.copy_(source)
    return result


def layout_of(sizes: Sequence[int], strides: Sequence[int]) -> tuple[tuple[int, str | int], ...]:
    """What strides are like, whatever the sizes: the axes from the innermost outwards, each "dense",
    "gapped" or "expanded" (the innermost by its stride). Axes of size 1 have no layout."""
    found: list[tuple[int, str | int]] = []
    dense = 1
    for axis in sorted(range(len(sizes)), key=lambda axis: (strides[axis], -axis)):
        if sizes[axis] == 1:
            continue
        if strides[axis] == 0:
            found.append((axis, "expanded"))
            continue
        innermost = all(kind == "expanded" for _, kind in found)
        found.append((axis, strides[axis] if innermost else "dense" if strides[axis] == dense else "gapped"))
        dense = strides[axis] * sizes[axis]
    return tuple(found)


#: Layouts that a kernel has to be right on, by name; see `with_layout`.
LAYOUTS = ("transposed", "sliced", "stepped", "misaligned", "expanded")


def with_layout(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The tensor's values in another memory layout; unused memory is NaN.

    ``transposed``: the last two axes are swapped in memory; ``sliced``: rows of a wider tensor;
    ``stepped``: every other element of one; ``misaligned``: contiguous, one element into its storage;
    ``expanded``: the first entry along axis 0, repeated by stride 0 (so the values change).

    Raises:
        ValueError: ``layout`` is none of these.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; the layouts are {', '.join(LAYOUTS)}")
    values = tensor.detach().contiguous()
    if values.dim() == 0 or values.numel() == 0:
        return values
    sizes, strides = list(values.shape), list(values.stride())
    offset = 0
    if layout == "misaligned":
        offset = 1
    elif layout == "stepped":
        strides = [2 * stride for stride in strides]
    elif layout == "expanded" and len(sizes) >= 2 and sizes[0] > 1:
        strides[0] = 0
    elif layout == "sliced" and len(sizes) >= 2:
        wider = [*sizes[:-1], sizes[-1] + 3]
        strides = [math.prod(wider[axis + 1 :]) for axis in range(len(wider))]
    elif layout == "transposed" and len(sizes) >= 2:
        strides[-1], strides[-2] = sizes[-2], 1
    return laid_out(values, strides, offset, gap=math.nan).requires_grad_(tensor.requires_grad)
