"""Softmax over rows, forward and backward.

Short rows stay in registers, several at a time. Long rows are read twice by one program: first from the
left, then from the right, so that what was read last, and is still in a cache, comes first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kpt_plugin_triton.kernels.exponentials import fold, merged
from kpt_plugin_triton.kernels.units import whole_units


@triton.jit
def softmax_forward(
    x,
    y,
    rows,
    columns,
    stride,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """ROWS rows a program; here and below ``columns`` and strides are multiples of UNIT."""
    columns = whole_units(columns, UNIT)
    stride = whole_units(stride, UNIT)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (column < columns)
    value = tl.load(x + row[:, None] * stride + column, mask=inside, other=float("-inf")).to(WIDE)
    # a row of nothing but -inf gives NaN, as everywhere
    value = tl.exp(value - tl.max(value, axis=1)[:, None])
    out = value / tl.sum(value, axis=1)[:, None]
    tl.store(y + row[:, None] * columns + column, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def softmax_forward_long(
    x,
    y,
    rows,
    columns,
    stride,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One row a program, read twice; the second time from the right, where caches hold it still."""
    columns = whole_units(columns, UNIT)
    stride = whole_units(stride, UNIT)
    row = tl.program_id(0).to(tl.int64)
    source = x + row * stride
    sink = y + row * columns
    place = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    blocks = tl.cdiv(columns, BLOCK)
    peak = tl.full([BLOCK // VECTOR], float("-inf"), WIDE)
    total = tl.zeros([BLOCK // VECTOR], WIDE)
    for number in range(blocks):
        column = number * BLOCK + place
        raw = tl.load(
            source + column, mask=column < columns, other=float("-inf"), eviction_policy="evict_last"
        )
        peak, total = fold(raw.to(WIDE), peak, total)
    shift, mass = merged(peak, total)
    inverse = 1.0 / mass
    for number in range(blocks):
        column = (blocks - 1 - number) * BLOCK + place
        inside = column < columns
        raw = tl.load(source + column, mask=inside, other=float("-inf"), eviction_policy="evict_first")
        out = tl.exp(raw.to(WIDE) - shift) * inverse
        tl.store(sink + column, out.to(y.dtype.element_ty), mask=inside, cache_modifier=".cs")


@triton.jit
def softmax_backward(
    y,
    dy,
    dx,
    rows,
    columns,
    y_stride,
    dy_stride,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    columns = whole_units(columns, UNIT)
    y_stride = whole_units(y_stride, UNIT)
    dy_stride = whole_units(dy_stride, UNIT)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (column < columns)
    value = tl.load(y + row[:, None] * y_stride + column, mask=inside, other=0.0).to(WIDE)
    grad = tl.load(dy + row[:, None] * dy_stride + column, mask=inside, other=0.0).to(WIDE)
    out = value * (grad - tl.sum(value * grad, axis=1)[:, None])
    tl.store(dx + row[:, None] * columns + column, out.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def softmax_backward_long(
    y,
    dy,
    dx,
    rows,
    columns,
    y_stride,
    dy_stride,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One row a program, both inputs read twice."""
    columns = whole_units(columns, UNIT)
    y_stride = whole_units(y_stride, UNIT)
    dy_stride = whole_units(dy_stride, UNIT)
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    blocks = tl.cdiv(columns, BLOCK)
    sums = tl.zeros([BLOCK], WIDE)
    for number in range(blocks):
        column = number * BLOCK + place
        inside = column < columns
        value = tl.load(y + row * y_stride + column, mask=inside, other=0.0, eviction_policy="evict_last")
        grad = tl.load(dy + row * dy_stride + column, mask=inside, other=0.0, eviction_policy="evict_last")
        sums += value.to(WIDE) * grad.to(WIDE)
    middle = tl.sum(sums, axis=0)
    for number in range(blocks):
        column = (blocks - 1 - number) * BLOCK + place
        inside = column < columns
        value = tl.load(y + row * y_stride + column, mask=inside, other=0.0, eviction_policy="evict_first")
        grad = tl.load(dy + row * dy_stride + column, mask=inside, other=0.0, eviction_policy="evict_first")
        out = value.to(WIDE) * (grad.to(WIDE) - middle)
        tl.store(dx + row * columns + column, out.to(dx.dtype.element_ty), mask=inside, cache_modifier=".cs")
