"""The sum of a word's, a position's and a type's embedding, layer-normalised, in one pass over the rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows_at(table, index, place, entries, stride, column, inside, WIDE: tl.constexpr):
    """Rows of ``table`` by the numbers at ``place``; NaN where a number is none of its rows."""
    number = tl.load(index + place).to(tl.int64)
    found = (number >= 0) & (number < entries)
    value = tl.load(
        table + number[:, None] * stride + column[None, :],
        mask=inside & found[:, None],
        other=float("nan"),
    )
    return value.to(WIDE)


@triton.jit
def embedding_sum_norm(
    words,
    word_ids,
    positions,
    position_ids,
    types,
    type_ids,
    weight,
    bias,
    y,
    total,
    mean,
    rstd,
    rows,
    word_count,
    position_count,
    type_count,
    word_stride,
    position_stride,
    type_stride,
    position_period,
    type_period,
    eps,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < COLUMNS)[None, :]
    # Rows past the end read the last one's numbers; the numbers of types and positions repeat.
    number = tl.minimum(row, rows - 1)
    value = _rows_at(words, word_ids, number, word_count, word_stride, column, inside, WIDE)
    if types is not None:
        again = number % type_period
        value += _rows_at(types, type_ids, again, type_count, type_stride, column, inside, WIDE)
    if positions is not None:
        again = number % position_period
        value += _rows_at(
            positions, position_ids, again, position_count, position_stride, column, inside, WIDE
        )
    place = row[:, None] * COLUMNS + column[None, :]
    if total is not None:
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=inside)
        value = rounded.to(WIDE)  # the backward starts from what was stored
    value = tl.where(inside, value, 0.0)
    middle = tl.sum(value, axis=1) / COLUMNS
    value = tl.where(inside, value - middle[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1) / COLUMNS + eps)
    if mean is not None:
        tl.store(mean + row, middle, mask=row < rows)
        tl.store(rstd + row, inverse, mask=row < rows)
    out = value * inverse[:, None]
    if weight is not None:
        out *= tl.load(weight + column, mask=column < COLUMNS, other=0.0).to(WIDE)[None, :]
    if bias is not None:
        out += tl.load(bias + column, mask=column < COLUMNS, other=0.0).to(WIDE)[None, :]
    tl.store(y + place, out.to(y.dtype.element_ty), mask=inside)
