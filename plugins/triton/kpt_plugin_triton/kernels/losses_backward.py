"""The gradient of cross entropy from the logits and what the forward pass kept of each row."""

from __future__ import annotations

import triton
import triton.language as tl

from kpt_plugin_triton.kernels.loss_terms import (
    cap_slope,
    class_factor,
    row_gradient,
    row_multiplier,
    scale_of,
    total_weight,
)
from kpt_plugin_triton.kernels.units import whole_units


@triton.jit
def _gradient_tiles(
    logits,
    target,
    weight,
    weight_total,
    denominators,
    lses,
    upstream,
    gradient,
    rows,
    columns,
    stride,
    upstream_stride,
    parts,
    ignore_index,
    smoothing,
    z_loss,
    cap,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    SMOOTH: tl.constexpr,
    Z: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDE: tl.constexpr,
):
    columns = whole_units(columns, UNIT)
    stride = whole_units(stride, UNIT)
    scale = scale_of(denominators, parts, PARTS, WIDE)
    weights = total_weight(weight_total, columns, WIDE)
    spread = smoothing / columns
    across = tl.cdiv(columns, BLOCK)
    # 64-bit: tiles of many rows of few columns each, or the other way round
    tiles = (tl.zeros([], tl.int64) + tl.cdiv(rows, ROWS)) * across
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        row = tile // across * ROWS + tl.arange(0, ROWS)
        column = ((tile % across) * BLOCK + tl.arange(0, BLOCK))[None, :]
        inside = (row < rows)[:, None] & (column < columns)
        raw = tl.load(logits + row[:, None] * stride + column, mask=inside, other=0.0)
        label = tl.load(target + row, mask=row < rows, other=ignore_index)
        lse = tl.load(lses + row, mask=row < rows, other=0.0)
        counts = (label != ignore_index) & (row < rows)
        bad = (label < 0) | (label >= columns)
        factor = class_factor(label, bad, weight, WIDE)
        grad = tl.load(upstream + row * upstream_stride, mask=row < rows, other=0.0).to(WIDE) * scale
        multiplier = grad * row_multiplier(lse, factor, weights, spread, smoothing, z_loss, SMOOTH, Z)
        hit = grad * factor
        if SMOOTH:
            hit = hit * (1.0 - smoothing)
        out = row_gradient(
            raw,
            column,
            inside,
            weight,
            lse[:, None],
            multiplier[:, None],
            (spread * grad)[:, None],
            cap,
            SMOOTH,
            CAPPED,
            WIDE,
        )
        out = tl.where(column == label[:, None], out - hit[:, None], out)
        if CAPPED:
            out *= cap_slope(raw, cap, WIDE)
        out = tl.where(counts[:, None], out, 0.0)
        tl.store(gradient + row[:, None] * columns + column, out.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def cross_entropy_gradient(
    logits,
    target,
    weight,
    weight_total,
    denominators,
    lses,
    upstream,
    gradient,
    rows,
    columns,
    stride,
    upstream_stride,
    parts,
    ignore_index,
    smoothing,
    z_loss,
    cap,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    SMOOTH: tl.constexpr,
    Z: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDE: tl.constexpr,
    UNLESS_ONE: tl.constexpr,
):
    """Gradients from the logits and each row's lse, times ``upstream`` (of a row, or one for all).

    ``columns`` and ``stride`` are multiples of UNIT.

    ``UNLESS_ONE``: ``gradient`` holds the result for an upstream gradient of 1 already, so that nothing is
    to be done for that; the host need not know the value.
    """
    needed = True
    if UNLESS_ONE:
        needed = tl.load(upstream).to(WIDE) != 1.0
    if needed:
        _gradient_tiles(
            logits,
            target,
            weight,
            weight_total,
            denominators,
            lses,
            upstream,
            gradient,
            rows,
            columns,
            stride,
            upstream_stride,
            parts,
            ignore_index,
            smoothing,
            z_loss,
            cap,
            UNIT,
            BLOCK,
            ROWS,
            PARTS,
            SMOOTH,
            Z,
            CAPPED,
            WIDE,
        )


@triton.jit
def scale_in_place(values, factor, count, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Multiply ``count`` values by a number on the device; nothing is read or written if that is 1."""
    scale = tl.load(factor).to(WIDE)
    if scale != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, count, step):
            place = start + tl.arange(0, BLOCK)
            value = tl.load(values + place, mask=place < count, other=0.0)
            tl.store(values + place, (value.to(WIDE) * scale).to(value.dtype), mask=place < count)
