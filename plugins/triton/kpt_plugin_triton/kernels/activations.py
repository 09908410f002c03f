"""Activation functions and their slopes, and bias + activation forward and backward."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """silu, gelu, gelu_tanh or relu of ``x`` in fp32 or fp64."""
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(z)) is sigmoid(2 z), which needs no tanh and cancels no digits
        y = x * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    else:
        y = tl.where(x < 0.0, 0.0, x)  # a NaN stays one
    return y


@triton.jit
def activate_with_slope(x, ACTIVATION: tl.constexpr):
    """(activation(x), its derivative at x)."""
    if ACTIVATION == "silu":
        gate = tl.sigmoid(x)
        y = x * gate
        slope = gate * (1.0 + x * (1.0 - gate))
    elif ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        y = x * below
        slope = below + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        gate = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        y = x * gate
        slope = gate + y * (1.0 - gate) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        y = tl.where(x < 0.0, 0.0, x)
        slope = tl.where(x > 0.0, 1.0, tl.where(x <= 0.0, 0.0, x))
    return y, slope


@triton.jit
def bias_activation_forward(
    x,
    bias,
    y,
    rows,
    columns,
    x_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(columns, BLOCK)
    row = (program // blocks) * ROWS + tl.arange(0, ROWS)
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(WIDE)
    if bias is not None:
        value += tl.load(bias + column, mask=column < columns, other=0.0).to(WIDE)[None, :]
    out = activate(value, ACTIVATION)
    tl.store(y + row[:, None] * columns + column[None, :], out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def bias_activation_backward(
    x,
    dy,
    bias,
    dx,
    bias_sums,
    rows,
    columns,
    x_stride,
    dy_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dx, and in bias_sums [programs of axis 1, columns] each program's sum of it over its rows."""
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_row = column < columns
    total = tl.zeros([ROWS, BLOCK], WIDE)
    if bias is not None:
        shift = tl.load(bias + column, mask=in_row, other=0.0).to(WIDE)[None, :]
    for tile in range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1)):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < rows)[:, None] & in_row[None, :]
        value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(WIDE)
        grad = tl.load(dy + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(WIDE)
        if bias is not None:
            value += shift
        _, slope = activate_with_slope(value, ACTIVATION)
        grad *= slope
        total += grad
        tl.store(dx + row[:, None] * columns + column[None, :], grad.to(dx.dtype.element_ty), mask=inside)
    if bias_sums is not None:
        place = tl.program_id(1).to(tl.int64) * columns + column
        tl.store(bias_sums + place, tl.sum(total, axis=0), mask=in_row)
