"""Activation functions and their slopes, and bias + activation forward and backward."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normal(x, COARSE: tl.constexpr):
    """(the standard normal distribution function at ``x``, exp(-x^2 / 2)).

    COARSE, for results in half precision: the tail is exp(-x^2 / 2) times a polynomial in
    1 / (1 + 0.315 |x|), the form of Hastings, Approximations for Digital Computers, 1955, sheet 43, with
    coefficients fitted for the smallest largest relative error, 3.8e-7 before rounding: less work than erf,
    and digits where x is far below zero, where 1 + erf cancels them. In fp32 erf is nearer around zero.
    """
    density = tl.exp(-0.5 * x * x)
    if COARSE:
        t = 1.0 / (1.0 + 0.315 * tl.abs(x))
        tail = 0.03444268916141192 * t - 0.12904361635623027
        tail = tail * t + 0.1252547872343163
        tail = tail * t + 0.00517898116537727
        tail = tail * t + 0.1014730097613038
        tail = tail * t + 0.11121297892138618
        tail = tail * t + 0.1258187207628768
        tail = tail * t + 0.12566230935227368
        tail *= t * density
        below = tl.where(x < 0.0, tail, 1.0 - tail)
    else:
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return below, density


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, COARSE: tl.constexpr = False):
    """silu, gelu, gelu_tanh or relu of ``x`` in fp32 or fp64; COARSE: for a result in half precision."""
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        below, _ = normal(x, COARSE)
        y = x * below
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(z)) is sigmoid(2 z), which needs no tanh and cancels no digits
        y = x * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    else:
        y = tl.where(x < 0.0, 0.0, x)  # a NaN stays one
    return y


@triton.jit
def activate_with_slope(x, ACTIVATION: tl.constexpr, COARSE: tl.constexpr = False):
    """(activation(x), its derivative at x)."""
    if ACTIVATION == "silu":
        gate = tl.sigmoid(x)
        y = x * gate
        slope = gate * (1.0 + x * (1.0 - gate))
    elif ACTIVATION == "gelu":
        below, density = normal(x, COARSE)
        y = x * below
        slope = below + x * density * 0.3989422804014327
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
    out = activate(value, ACTIVATION, y.dtype.element_ty.primitive_bitwidth == 16)
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
        _, slope = activate_with_slope(value, ACTIVATION, dx.dtype.element_ty.primitive_bitwidth == 16)
        grad *= slope
        total += grad
        tl.store(dx + row[:, None] * columns + column[None, :], grad.to(dx.dtype.element_ty), mask=inside)
    if bias_sums is not None:
        place = tl.program_id(1).to(tl.int64) * columns + column
        tl.store(bias_sums + place, tl.sum(total, axis=0), mask=in_row)
