"""rms_norm and layer_norm, with or without a residual that is added first, forward and backward.

A program keeps whole rows in registers. Backward programs are persistent: each walks over many rows and
keeps its own sum of the weight's gradient, [programs, columns] in fp32, which `column_sums` adds up in a
fixed order, so that gradients are the same bits from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_forward(
    x,
    residual,
    weight,
    bias,
    y,
    total,
    mean,
    rstd,
    rows,
    x_stride,
    residual_stride,
    eps,
    offset,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CENTRED: tl.constexpr,
    STATISTICS: tl.constexpr,
    WIDE: tl.constexpr,
):
    # 64-bit row numbers: a tensor may have more than 2**31 elements
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < COLUMNS)[None, :]
    value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
    if residual is not None:
        other = tl.load(residual + row[:, None] * residual_stride + column[None, :], mask=inside, other=0.0)
        # rounded to the stream's dtype first, because that sum is a result of its own
        value = (value.to(WIDE) + other.to(WIDE)).to(total.dtype.element_ty)
        tl.store(total + row[:, None] * COLUMNS + column[None, :], value, mask=inside)
    wide = value.to(WIDE)
    if CENTRED:
        middle = tl.sum(wide, axis=1) / COLUMNS
        wide = tl.where(inside, wide - middle[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=1) / COLUMNS + eps)
    if STATISTICS:
        if CENTRED:
            tl.store(mean + row, middle, mask=row < rows)
        tl.store(rstd + row, inverse, mask=row < rows)
    out = wide * inverse[:, None]
    if weight is not None:
        scale = tl.load(weight + column, mask=column < COLUMNS, other=0.0).to(WIDE) + offset
        out = out * scale[None, :]
    if bias is not None:
        out += tl.load(bias + column, mask=column < COLUMNS, other=0.0).to(WIDE)[None, :]
    tl.store(y + row[:, None] * COLUMNS + column[None, :], out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def norm_forward_long(
    x,
    residual,
    weight,
    bias,
    y,
    total,
    mean,
    rstd,
    rows,
    x_stride,
    residual_stride,
    eps,
    offset,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CENTRED: tl.constexpr,
    STATISTICS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The same, BLOCK columns at a time, the row read again: from the first-level cache, if it fits there.

    For rows that do not fit in registers, and where it is faster to have more rows under way.
    """
    row = tl.program_id(0).to(tl.int64)
    source = x + row * x_stride
    # Shifted sums: what stands in for the mean keeps digits from cancelling. The first column may be the one
    # that stands out, by at most the root of COLUMNS deviations; half precision does not show what that costs
    # in short rows. Elsewhere it is the mean of the first block, however much one column stands out.
    SINGLE: tl.constexpr = COLUMNS <= 8192 and x.dtype.element_ty.primitive_bitwidth == 16
    FIRST: tl.constexpr = 1 if SINGLE else BLOCK
    COUNTED: tl.constexpr = FIRST if FIRST < COLUMNS else COLUMNS
    shift = tl.zeros([1], WIDE)
    if CENTRED:
        ahead = tl.arange(0, FIRST)
        known = tl.load(source + ahead, mask=ahead < COLUMNS, other=0.0).to(WIDE)
        if residual is not None:
            added = residual + row * residual_stride + ahead
            known += tl.load(added, mask=ahead < COLUMNS, other=0.0).to(WIDE)
        shift += tl.sum(known, axis=0) / COUNTED
    sums = tl.zeros([BLOCK], WIDE)
    squares = tl.zeros([BLOCK], WIDE)
    for start in range(0, COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < COLUMNS
        value = tl.load(source + column, mask=inside, other=0.0, eviction_policy="evict_last")
        if residual is not None:
            other = tl.load(residual + row * residual_stride + column, mask=inside, other=0.0)
            value = (value.to(WIDE) + other.to(WIDE)).to(total.dtype.element_ty)
            tl.store(total + row * COLUMNS + column, value, mask=inside)
        wide = tl.where(inside, value.to(WIDE) - shift, 0.0)
        sums += wide
        squares += wide * wide
    moved = tl.sum(sums) / COLUMNS
    variance = tl.sum(squares) / COLUMNS
    middle = shift
    if CENTRED:
        variance -= moved * moved
        middle = shift + moved
    inverse = tl.rsqrt(variance + eps)
    if STATISTICS:
        if CENTRED:
            tl.store(mean + row + tl.arange(0, 1), middle)
        tl.store(rstd + row, inverse)
    for start in range(0, COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < COLUMNS
        value = tl.load(source + column, mask=inside, other=0.0, eviction_policy="evict_first")
        if residual is not None:
            other = tl.load(residual + row * residual_stride + column, mask=inside, other=0.0)
            value = (value.to(WIDE) + other.to(WIDE)).to(total.dtype.element_ty)
        out = value.to(WIDE)
        if CENTRED:
            out -= middle
        out *= inverse
        if weight is not None:
            out *= tl.load(weight + column, mask=inside, other=0.0).to(WIDE) + offset
        if bias is not None:
            out += tl.load(bias + column, mask=inside, other=0.0).to(WIDE)
        tl.store(y + row * COLUMNS + column, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _tile(
    x, dy, tile, rows, x_stride, dy_stride, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """ROWS rows of x and dy, zero beyond the last one."""
    row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < COLUMNS)[None, :]
    return (
        tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0),
        tl.load(dy + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0),
    )


@triton.jit
def norm_backward(
    x,
    dy,
    dtotal,
    weight,
    mean,
    rstd,
    dx,
    weight_sums,
    bias_sums,
    rows,
    x_stride,
    dy_stride,
    dtotal_stride,
    offset,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CENTRED: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    in_row = column < COLUMNS
    if weight is not None:
        scale = tl.load(weight + column, mask=in_row, other=0.0).to(WIDE) + offset
    weight_sum = tl.zeros([BLOCK], WIDE)
    bias_sum = tl.zeros([BLOCK], WIDE)
    # The next rows are on their way to shared memory while one is worked on (STAGES > 2). Where that is too
    # small, sums of two gradients leave registers for the 16-bit values of one more row.
    AHEAD: tl.constexpr = STAGES == 1 and CENTRED and x.dtype.element_ty.primitive_bitwidth == 16
    if AHEAD:
        next_x, next_dy = _tile(x, dy, program, rows, x_stride, dy_stride, COLUMNS, BLOCK, ROWS)
    for tile in tl.range(program, tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & in_row[None, :]
        if AHEAD:
            unit = next_x.to(WIDE)
            grad = next_dy.to(WIDE)
            next_x, next_dy = _tile(
                x, dy, tile + tl.num_programs(0), rows, x_stride, dy_stride, COLUMNS, BLOCK, ROWS
            )
        else:
            raw_x, raw_dy = _tile(x, dy, tile, rows, x_stride, dy_stride, COLUMNS, BLOCK, ROWS)
            unit = raw_x.to(WIDE)
            grad = raw_dy.to(WIDE)
        inverse = tl.load(rstd + row, mask=row < rows, other=0.0)
        if CENTRED:
            unit -= tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
        unit *= inverse[:, None]
        if weight_sums is not None:
            weight_sum += tl.sum(grad * unit, axis=0)
        if bias_sums is not None:
            bias_sum += tl.sum(grad, axis=0)
        if weight is not None:
            grad = grad * scale[None, :]
        out = grad - unit * (tl.sum(grad * unit, axis=1) / COLUMNS)[:, None]
        if CENTRED:
            out -= (tl.sum(grad, axis=1) / COLUMNS)[:, None]
        out *= inverse[:, None]
        if dtotal is not None:
            out += tl.load(
                dtotal + row[:, None] * dtotal_stride + column[None, :], mask=inside, other=0.0
            ).to(WIDE)
        tl.store(dx + row[:, None] * COLUMNS + column[None, :], out.to(dx.dtype.element_ty), mask=inside)
    # 64-bit: programs x columns may pass 2**31 on wide rows
    place = program.to(tl.int64) * COLUMNS + column
    if weight_sums is not None:
        tl.store(weight_sums + place, weight_sum, mask=in_row)
    if bias_sums is not None:
        tl.store(bias_sums + place, bias_sum, mask=in_row)


@triton.jit
def norm_backward_long(
    x,
    dy,
    dtotal,
    weight,
    mean,
    rstd,
    dx,
    x_stride,
    dy_stride,
    dtotal_stride,
    offset,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    CENTRED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dx for rows that do not fit in registers, one a program; `norm_weight_sums` does the rest."""
    row = tl.program_id(0).to(tl.int64)
    inverse = tl.load(rstd + row)
    middle = tl.zeros([1], WIDE)
    if CENTRED:
        middle += tl.load(mean + row)
    along = tl.zeros([BLOCK], WIDE)
    plain = tl.zeros([BLOCK], WIDE)
    for start in range(0, COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < COLUMNS
        unit = (tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(WIDE) - middle) * inverse
        grad = tl.load(dy + row * dy_stride + column, mask=inside, other=0.0).to(WIDE)
        if weight is not None:
            grad *= tl.load(weight + column, mask=inside, other=0.0).to(WIDE) + offset
        along += grad * unit
        plain += grad
    shared = tl.sum(along) / COLUMNS
    common = tl.sum(plain) / COLUMNS
    for start in range(0, COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < COLUMNS
        unit = (tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(WIDE) - middle) * inverse
        out = tl.load(dy + row * dy_stride + column, mask=inside, other=0.0).to(WIDE)
        if weight is not None:
            out *= tl.load(weight + column, mask=inside, other=0.0).to(WIDE) + offset
        out -= unit * shared
        if CENTRED:
            out -= common
        out *= inverse
        if dtotal is not None:
            out += tl.load(dtotal + row * dtotal_stride + column, mask=inside, other=0.0).to(WIDE)
        tl.store(dx + row * COLUMNS + column, out.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def norm_weight_sums(
    x,
    dy,
    mean,
    rstd,
    weight_sums,
    bias_sums,
    rows,
    x_stride,
    dy_stride,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    CENTRED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Sums over rows for the weight's and the bias's gradient, BLOCK columns by each program."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < COLUMNS
    weight_sum = tl.zeros([BLOCK], WIDE)
    bias_sum = tl.zeros([BLOCK], WIDE)
    for number in range(tl.program_id(1), rows, tl.num_programs(1)):
        row = number + tl.zeros([1], tl.int64)
        unit = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(WIDE)
        grad = tl.load(dy + row * dy_stride + column, mask=inside, other=0.0).to(WIDE)
        if CENTRED:
            unit -= tl.load(mean + row)
        weight_sum += grad * unit * tl.load(rstd + row)
        bias_sum += grad
    place = tl.program_id(1).to(tl.int64) * COLUMNS + column
    if weight_sums is not None:
        tl.store(weight_sums + place, weight_sum, mask=inside)
    if bias_sums is not None:
        tl.store(bias_sums + place, bias_sum, mask=inside)


@triton.jit
def column_sums(
    weight_sums,
    bias_sums,
    dweight,
    dbias,
    programs,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Add [programs, COLUMNS] up over the programs; two sums in one launch, either may be None."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_row = column < COLUMNS
    weight_sum = tl.zeros([ROWS, BLOCK], WIDE)
    bias_sum = tl.zeros([ROWS, BLOCK], WIDE)
    for start in range(0, programs, ROWS):
        program = start + tl.arange(0, ROWS)
        inside = (program < programs)[:, None] & in_row[None, :]
        place = program.to(tl.int64)[:, None] * COLUMNS + column[None, :]
        if weight_sums is not None:
            weight_sum += tl.load(weight_sums + place, mask=inside, other=0.0)
        if bias_sums is not None:
            bias_sum += tl.load(bias_sums + place, mask=inside, other=0.0)
    if weight_sums is not None:
        tl.store(dweight + column, tl.sum(weight_sum, axis=0).to(dweight.dtype.element_ty), mask=in_row)
    if bias_sums is not None:
        tl.store(dbias + column, tl.sum(bias_sum, axis=0).to(dbias.dtype.element_ty), mask=in_row)
