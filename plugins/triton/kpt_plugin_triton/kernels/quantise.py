"""fp8 quantisation of rows, alone or behind a norm or a gated activation, in the pass that computes them.

MODE "row" and "block" need nothing but their own row or group of GROUP columns; "tensor" takes a given scale,
or the maxima that `largest_rows` found in a pass before.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: An absolute maximum below this counts as this: the reciprocal of a scale has to be finite.
SMALLEST = tl.constexpr(2.0**-100)


@triton.jit
def fp8_codes(value, BIAS: tl.constexpr):
    """fp8 bits (uint8) of fp32 values within the type's range, rounded to nearest, ties to even.

    BIAS 7 is e4m3fn, 8 e4m3fnuz. For GPUs that cannot convert to this type themselves.
    """
    bits = value.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    rounded = size + 0x7FFFF + ((size >> 20) & 1)
    normal = (rounded >> 20) - ((127 - BIAS) << 3)
    # Adding a number whose last binary digit is the step of subnormals lets the addition round to it.
    shifted = size.to(tl.float32, bitcast=True) + 2.0 ** (21 - BIAS)
    small = shifted.to(tl.int32, bitcast=True) - ((148 - BIAS) << 23)
    code = tl.where(size < ((128 - BIAS) << 23), small, normal)
    if BIAS == 7:
        code = tl.where(size > 0x7F800000, 0x7F, code) | sign
    else:  # no negative zero; its pattern is NaN
        code = tl.where(code == 0, 0, code | sign)
        code = tl.where(size > 0x7F800000, 0x80, code)
    return code.to(tl.uint8)


@triton.jit
def fp8_store(place, value, inside, LARGEST: tl.constexpr, BIAS: tl.constexpr):
    """Store values as fp8, those beyond the range as the largest, NaN as NaN."""
    value = tl.clamp(value, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    if BIAS == 0:
        tl.store(place, value.to(place.dtype.element_ty), mask=inside)
    else:
        tl.store(place, fp8_codes(value, BIAS), mask=inside)


@triton.jit
def row_values(
    x,
    other,
    weight,
    bias,
    total,
    row,
    column,
    inside,
    x_stride,
    other_stride,
    eps,
    offset,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
):
    """What is quantised, in fp32, zero outside; stores x + other (a norm's residual) into ``total``."""
    value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
    if other is not None:
        added = tl.load(other + row[:, None] * other_stride + column[None, :], mask=inside, other=0.0)
    if KIND == "glu":
        wide = value.to(tl.float32)
        wide = wide * tl.sigmoid(wide) * added.to(tl.float32)
    elif KIND == "plain":
        wide = value.to(tl.float32)
    else:
        if other is not None:
            # rounded to the stream's dtype first, because that sum is a result of its own
            value = (value.to(tl.float32) + added.to(tl.float32)).to(x.dtype.element_ty)
            tl.store(total + row[:, None] * COLUMNS + column[None, :], value, mask=inside)
        wide = value.to(tl.float32)
        if KIND == "layer":
            middle = tl.sum(wide, axis=1) / COLUMNS
            wide = tl.where(inside, wide - middle[:, None], 0.0)
        inverse = tl.rsqrt(tl.sum(wide * wide, axis=1) / COLUMNS + eps)
        wide = wide * inverse[:, None]
        if weight is not None:
            factor = tl.load(weight + column, mask=column < COLUMNS, other=0.0).to(tl.float32) + offset
            wide = wide * factor[None, :]
        if bias is not None:
            shift = tl.load(bias + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
            wide = tl.where(inside, wide + shift[None, :], 0.0)
    return wide


@triton.jit
def scales(most, LARGEST: tl.constexpr):
    """(scale, its reciprocal) for absolute maxima; 1 where all is zero."""
    bounded = tl.maximum(most, SMALLEST)
    filled = most > 0.0
    return tl.where(filled, bounded / LARGEST, 1.0), tl.where(filled, LARGEST / bounded, 1.0)


@triton.jit
def quantise_rows(
    x,
    other,
    weight,
    bias,
    given,
    q,
    total,
    scale,
    maxima,
    rows,
    parts,
    x_stride,
    other_stride,
    eps,
    offset,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    KIND: tl.constexpr,
    MODE: tl.constexpr,
    GROUP: tl.constexpr,
    LARGEST: tl.constexpr,
    BIAS: tl.constexpr,
):
    program = tl.program_id(0)
    if MODE == "tensor" and maxima is not None:
        # The rows that the pass before read last may still be in the cache: begin with those.
        program = tl.num_programs(0) - 1 - program
    chunks: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    row = (program // chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (program % chunks) * BLOCK + tl.arange(0, BLOCK)
    present = row < rows
    inside = present[:, None] & (column < COLUMNS)[None, :]
    value = row_values(
        x, other, weight, bias, total, row, column, inside, x_stride, other_stride, eps, offset, COLUMNS, KIND
    )
    if MODE == "row":
        step, inverse = scales(tl.max(tl.abs(value), axis=1), LARGEST)
        tl.store(scale + row, step, mask=present)
        value = value * inverse[:, None]
    elif MODE == "block":
        grouped = tl.reshape(value, [ROWS, BLOCK // GROUP, GROUP])
        step, inverse = scales(tl.max(tl.abs(grouped), axis=2), LARGEST)
        groups: tl.constexpr = (COLUMNS + GROUP - 1) // GROUP
        group = (program % chunks) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
        stored = present[:, None] & (group < groups)[None, :]
        tl.store(scale + row[:, None] * groups + group[None, :], step, mask=stored)
        value = tl.reshape(grouped * inverse[:, :, None], [ROWS, BLOCK])
    elif maxima is not None:
        part = tl.arange(0, PARTS)
        most = tl.max(tl.load(maxima + part, mask=part < parts, other=0.0), axis=0)
        step, inverse = scales(most, LARGEST)
        tl.store(scale, step, mask=program == 0)
        value = value * inverse
    else:
        value = value / tl.load(given).to(tl.float32)
    fp8_store(q + row[:, None] * COLUMNS + column[None, :], value, inside, LARGEST, BIAS)


@triton.jit
def largest_rows(
    x,
    other,
    weight,
    bias,
    total,
    maxima,
    rows,
    x_stride,
    other_stride,
    eps,
    offset,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KIND: tl.constexpr,
):
    """The absolute maximum over each program's tiles; a maximum is the same in any order."""
    chunks: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    most = tl.zeros([ROWS], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS) * chunks, tl.num_programs(0)):
        row = (tile // chunks) * ROWS + tl.arange(0, ROWS).to(tl.int64)
        column = (tile % chunks) * BLOCK + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (column < COLUMNS)[None, :]
        value = row_values(
            x,
            other,
            weight,
            bias,
            total,
            row,
            column,
            inside,
            x_stride,
            other_stride,
            eps,
            offset,
            COLUMNS,
            KIND,
        )
        most = tl.maximum(most, tl.max(tl.abs(value), axis=1))
    tl.store(maxima + tl.program_id(0), tl.max(most, axis=0))
