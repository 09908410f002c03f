"""softmax and cross entropy over rows, forward and backward.

Short rows stay in registers, several at a time. Long rows are read twice by one program: first from the
left for the maximum and the sum of exponentials, then from the right, so that what was read last, and is
still in a cache, comes first. A vocabulary of 128256 in bf16 is 256 KB a row: with one program on each
multiprocessor most of it stays in the first-level cache, and memory sees each logit once.

The loss of a row with label t, weight w and smoothing s over C classes is
``(1 - s) w[t] (lse - x[t]) + s / C sum(w (lse - x)) + z w[t] lse**2``, where ``x`` may be
``cap tanh(x / cap)``.
"""

from __future__ import annotations

import triton
import triton.language as tl

# ---------------------------------------------------------------------------------------------
# Parts


@triton.jit
def _fold(value, peak, total):
    """Take ``value`` [R, V] into running maxima and sums of exponentials [R]."""
    higher = tl.maximum(peak, tl.max(value, axis=1))
    # any finite shift will do while all is -inf, and -inf - -inf would be NaN
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    total = total * tl.exp(peak - shift) + tl.sum(tl.exp(value - shift[:, None]), axis=1)
    return higher, total


@triton.jit
def _merged(peak, total):
    """(finite shift, sum of exponentials over it) of all running pairs [R]."""
    highest = tl.max(peak, axis=0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    return shift, tl.sum(total * tl.exp(peak - shift), axis=0)


@triton.jit
def _exponentials(value, shift):
    """exp(value - shift), [R, V] and [R], by one fused multiply-add and one power of two for each."""
    LOG2E: tl.constexpr = 1.4426950408889634
    return tl.exp2(value * LOG2E - (shift * LOG2E)[:, None])


@triton.jit
def _joined(shift, total, other_shift, other_total):
    """Two sums of exponentials over their (finite) shifts, as one."""
    higher = tl.maximum(shift, other_shift)
    total = total * tl.exp(shift - higher) + other_total * tl.exp(other_shift - higher)
    return higher, total


@triton.jit
def _row_maximum(source, place, last, in_last, blocks, BLOCK: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """The maximum of a row of logits; 0 where that is -inf, as any finite shift will do then."""
    raw = tl.load(source + last, mask=in_last, other=float("-inf"))
    peak = tl.max(raw.to(WIDE), axis=1)
    for number in range(blocks):
        raw = tl.load(source + number * BLOCK + place)
        peak = tl.maximum(peak, tl.max(raw.to(WIDE), axis=1))
    highest = tl.max(peak, axis=0)
    return tl.where(highest == float("-inf"), 0.0, highest)


@triton.jit
def _squashed(value, cap):
    """tanh(value / cap); the exponential may overflow, which gives 1."""
    return 1.0 - 2.0 / (tl.exp(2.0 * value / cap) + 1.0)


@triton.jit
def _wide(raw, inside, cap, CAPPED: tl.constexpr, WIDE: tl.constexpr):
    """Logits as they count; -inf outside of the row, where ``inside`` is not None."""
    value = raw.to(WIDE)
    if CAPPED:
        value = _squashed(value, cap) * cap
        if inside is not None:
            value = tl.where(inside, value, float("-inf"))
    return value


@triton.jit
def _scale_of(denominators, parts, PARTS: tl.constexpr, WIDE: tl.constexpr):
    """One over the sum of up to PARTS partial counts; 1 where there are none."""
    scale = tl.full([], 1.0, WIDE)
    if denominators is not None:
        part = tl.arange(0, PARTS)
        scale = 1.0 / tl.sum(tl.load(denominators + part, mask=part < parts, other=0.0), axis=0)
    return scale


@triton.jit
def _factor(label, bad, weight, WIDE: tl.constexpr):
    """The weight of the label's class; NaN, instead of a read out of bounds, where there is no such class."""
    if weight is not None:
        factor = tl.load(weight + tl.where(bad, 0, label)).to(WIDE)
    else:
        factor = tl.where(bad, 0.0, 1.0).to(WIDE)
    return tl.where(bad, float("nan"), factor)


@triton.jit
def _loss(
    chosen, plain_sum, lse, factor, weights, spread, smoothing, z_loss, SMOOTH: tl.constexpr, Z: tl.constexpr
):
    loss = factor * (lse - chosen)
    if SMOOTH:
        loss = (1.0 - smoothing) * loss + spread * (weights * lse - plain_sum)
    if Z:
        loss += z_loss * factor * lse * lse
    return loss


@triton.jit
def _multiplier(lse, factor, weights, spread, smoothing, z_loss, SMOOTH: tl.constexpr, Z: tl.constexpr):
    """What the probabilities of a row are multiplied by in its gradient."""
    multiplier = factor
    if SMOOTH:
        multiplier = (1.0 - smoothing) * factor + spread * weights
    if Z:
        multiplier += 2.0 * z_loss * factor * lse
    return multiplier


@triton.jit
def _total_weight(weight_total, columns, WIDE: tl.constexpr):
    if weight_total is not None:
        weights = tl.load(weight_total).to(WIDE)
    else:
        weights = tl.full([], 1.0, WIDE) * columns
    return weights


@triton.jit
def _class_weights(weight, column, inside, WIDE: tl.constexpr):
    if inside is not None:
        found = tl.load(weight + column, mask=inside, other=0.0)
    else:
        found = tl.load(weight + column)
    return found.to(WIDE)


@triton.jit
def _row_gradient(
    raw,
    column,
    inside,
    weight,
    lse,
    multiplier,
    spread,
    cap,
    SMOOTH: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The gradient of a tile of rows but for the label's part and the cap's slope; factors hold the scale."""
    LOG2E: tl.constexpr = 1.4426950408889634
    value = raw.to(WIDE)
    if CAPPED:
        value = _squashed(value, cap) * cap
    if SMOOTH or CAPPED:
        out = tl.exp(value - lse) * multiplier
    else:
        out = tl.exp2(value * LOG2E - lse * LOG2E) * multiplier
    if SMOOTH:
        if weight is not None:
            out -= spread * _class_weights(weight, column, inside, WIDE)
        else:
            out -= spread
    return out


@triton.jit
def _slope(raw, cap, WIDE: tl.constexpr):
    """The derivative of cap * tanh(raw / cap)."""
    unit = _squashed(raw.to(WIDE), cap)
    return 1.0 - unit * unit


@triton.jit
def _plain_sums(value, column, inside, weight, WIDE: tl.constexpr):
    """Sums of (weighted) logits along the rows of a tile, for label smoothing."""
    if weight is not None:
        value = value * _class_weights(weight, column, inside, WIDE)
    if inside is not None:
        value = tl.where(inside, value, 0.0)
    return tl.sum(value, axis=1)


# ---------------------------------------------------------------------------------------------
# Cross entropy


@triton.jit
def count_targets(
    target, weight, denominators, rows, columns, ignore_index, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    """One partial sum a program of what a mean divides by: targets that count, or their weights."""
    kept = tl.zeros([BLOCK], WIDE)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK), tl.num_programs(0)):
        row = (tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        label = tl.load(target + row, mask=row < rows, other=0)
        counts = (row < rows) & (label != ignore_index)
        if weight is not None:
            known = counts & (label >= 0) & (label < columns)
            kept += tl.load(weight + label, mask=known, other=0.0).to(WIDE)
        else:
            kept += tl.where(counts, 1.0, 0.0)
    tl.store(denominators + tl.program_id(0), tl.sum(kept, axis=0))


@triton.jit
def finish_loss(
    partials, denominators, loss, count, parts, BLOCK: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr
):
    """Add partial sums up in a fixed order and divide; one program."""
    kept = tl.zeros([BLOCK], WIDE)
    for start in range(0, count, BLOCK):
        part = start + tl.arange(0, BLOCK)
        kept += tl.load(partials + part, mask=part < count, other=0.0)
    out = tl.sum(kept, axis=0) * _scale_of(denominators, parts, PARTS, WIDE)
    tl.store(loss, out.to(loss.dtype.element_ty))


@triton.jit
def cross_entropy_short(
    logits,
    target,
    weight,
    weight_total,
    denominators,
    lses,
    losses,
    partials,
    gradient,
    rows,
    columns,
    stride,
    parts,
    ignore_index,
    smoothing,
    z_loss,
    cap,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    SMOOTH: tl.constexpr,
    Z: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Losses and gradients of ROWS rows at a time; ``gradient`` may be ``logits`` if that is contiguous."""
    scale = _scale_of(denominators, parts, PARTS, WIDE)
    weights = _total_weight(weight_total, columns, WIDE)
    spread = smoothing / columns
    column = tl.arange(0, BLOCK)[None, :]
    kept = tl.zeros([ROWS], WIDE)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < columns)
        raw = tl.load(logits + row[:, None] * stride + column, mask=inside, other=float("-inf"))
        label = tl.load(target + row, mask=row < rows, other=ignore_index)
        counts = (label != ignore_index) & (row < rows)
        bad = (label < 0) | (label >= columns)
        factor = _factor(label, bad, weight, WIDE)
        value = _wide(raw, inside, cap, CAPPED, WIDE)
        highest = tl.max(value, axis=1)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        exponential = tl.exp(value - shift[:, None])
        total = tl.sum(exponential, axis=1)
        lse = shift + tl.log(total)
        here = column == label[:, None]
        # from the registers: the gradient may go where the logits are
        chosen = tl.sum(tl.where(here, value, 0.0), axis=1)
        plain = lse
        if SMOOTH:
            plain = _plain_sums(value, column, inside, weight, WIDE)
        loss = _loss(chosen, plain, lse, factor, weights, spread, smoothing, z_loss, SMOOTH, Z)
        loss = tl.where(counts, loss, 0.0)
        kept += loss
        if losses is not None:
            tl.store(losses + row, loss.to(losses.dtype.element_ty), mask=row < rows)
        if lses is not None:
            tl.store(lses + row, lse, mask=row < rows)
        if gradient is not None:
            multiplier = _multiplier(lse, factor, weights, spread, smoothing, z_loss, SMOOTH, Z)
            out = exponential * (multiplier / total * scale)[:, None]
            hit = factor * scale
            if SMOOTH:
                hit = hit * (1.0 - smoothing)
                if weight is not None:
                    out -= (
                        spread * scale * tl.load(weight + column, mask=column < columns, other=0.0).to(WIDE)
                    )
                else:
                    out -= spread * scale
            out = tl.where(here, out - hit[:, None], out)
            if CAPPED:
                unit = value / cap
                out *= 1.0 - unit * unit
            out = tl.where(counts[:, None], out, 0.0)
            tl.store(
                gradient + row[:, None] * columns + column, out.to(gradient.dtype.element_ty), mask=inside
            )
    if partials is not None:
        tl.store(partials + tl.program_id(0), tl.sum(kept, axis=0))


@triton.jit
def cross_entropy_long(
    logits,
    target,
    weight,
    weight_total,
    denominators,
    lses,
    losses,
    partials,
    gradient,
    rows,
    columns,
    stride,
    parts,
    ignore_index,
    smoothing,
    z_loss,
    cap,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN: tl.constexpr,
    PARTS: tl.constexpr,
    SMOOTH: tl.constexpr,
    Z: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The same for rows of at least BLOCK columns, one after the other, each read twice.

    A thread loads VECTOR columns side by side. Its exponentials are taken over the maximum of its first
    columns, which costs no running maximum; where a row's sums grow too large for that, or start with
    nothing but -inf, it is summed again over the row's maximum. With smoothing or a soft cap, which need
    those registers, maxima run. The next row is under way while the gradient is stored. ``EVEN``: the number
    of columns is a multiple of VECTOR.
    """
    scale = _scale_of(denominators, parts, PARTS, WIDE)
    weights = _total_weight(weight_total, columns, WIDE)
    spread = smoothing / columns
    place = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    blocks = columns // BLOCK
    whole = blocks * BLOCK
    last = whole + place
    if EVEN:
        # one comparison for all columns of a vector
        in_last = (whole + tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR) < columns
        in_last = in_last & (tl.arange(0, VECTOR)[None, :] >= 0)
    else:
        in_last = last < columns
    one = tl.arange(0, 1)
    kept = tl.zeros([1], WIDE)
    # 64-bit row numbers: a tensor may have more than 2**31 elements
    start = tl.program_id(0).to(tl.int64)
    # Smoothing and a soft cap need the registers themselves, and so do 32-bit logits.
    QUICK: tl.constexpr = not SMOOTH and not CAPPED
    PREFETCH: tl.constexpr = QUICK and EVEN and logits.dtype.element_ty.primitive_bitwidth == 16
    if PREFETCH:
        next_label = tl.load(target + start)
        ahead = tl.load(logits + start * stride + place, eviction_policy="evict_last")
    for row in range(start, rows, tl.num_programs(0)):
        source = logits + row * stride
        sink = source
        if gradient is not None:
            sink = gradient + row * columns
        if PREFETCH:
            label = next_label
            following = tl.minimum(row + tl.num_programs(0), rows - 1)
            next_label = tl.load(target + following)
        else:
            label = tl.load(target + row)
            ahead = tl.load(source + place, eviction_policy="evict_last")
        if label != ignore_index:
            bad = (label < 0) | (label >= columns)
            factor = _factor(label, bad, weight, WIDE)
            chosen = tl.load(source + tl.where(bad, 0, label) + one)
            sums = tl.zeros([BLOCK // VECTOR], WIDE)
            shift = tl.zeros([], WIDE)
            mass = tl.zeros([], WIDE)
            if QUICK:
                top = tl.max(ahead.to(WIDE), axis=1)
                shifts = tl.where(top == float("-inf"), 0.0, top)
                # infinity is larger than any sum that is trusted below
                total = tl.where(top == float("-inf"), float("inf"), tl.zeros([BLOCK // VECTOR], WIDE))
                tries = 2
                while tries > 0:
                    # The next block is under way while this one is summed.
                    for number in range(1, blocks):
                        value = ahead.to(WIDE)
                        ahead = tl.load(source + number * BLOCK + place, eviction_policy="evict_last")
                        total += tl.sum(_exponentials(value, shifts), axis=1)
                    total += tl.sum(_exponentials(ahead.to(WIDE), shifts), axis=1)
                    if whole < columns:
                        raw = tl.load(
                            source + last, mask=in_last, other=float("-inf"), eviction_policy="evict_last"
                        )
                        total += tl.sum(_exponentials(raw.to(WIDE), shifts), axis=1)
                    # Beyond 2**64 a sum may weigh more than what exponentials of other shifts still show.
                    total = tl.where(total < 1.8446744073709552e19, total, float("inf"))
                    shift, mass = tl.reduce((shifts, total), 0, _joined)
                    tries -= 1
                    if mass < float("inf"):
                        tries = 0
                    if tries > 0:
                        highest = _row_maximum(source, place, last, in_last, blocks, BLOCK, WIDE)
                        shifts = tl.zeros([BLOCK // VECTOR], WIDE) + highest
                        total = tl.zeros([BLOCK // VECTOR], WIDE)
                        ahead = tl.load(source + place, eviction_policy="evict_last")
            else:
                peak = tl.full([BLOCK // VECTOR], float("-inf"), WIDE)
                total = tl.zeros([BLOCK // VECTOR], WIDE)
                # The incomplete block goes first: the next one is under way while it is folded.
                if whole < columns:
                    raw = tl.load(
                        source + last, mask=in_last, other=float("-inf"), eviction_policy="evict_last"
                    )
                    value = _wide(raw, in_last, cap, CAPPED, WIDE)
                    peak, total = _fold(value, peak, total)
                    if SMOOTH:
                        sums += _plain_sums(value, last, in_last, weight, WIDE)
                for number in range(1, blocks):
                    value = _wide(ahead, None, cap, CAPPED, WIDE)
                    ahead = tl.load(source + number * BLOCK + place, eviction_policy="evict_last")
                    peak, total = _fold(value, peak, total)
                    if SMOOTH:
                        sums += _plain_sums(value, (number - 1) * BLOCK + place, None, weight, WIDE)
                value = _wide(ahead, None, cap, CAPPED, WIDE)
                peak, total = _fold(value, peak, total)
                if SMOOTH:
                    sums += _plain_sums(value, whole - BLOCK + place, None, weight, WIDE)
                shift, mass = _merged(peak, total)
            if PREFETCH:
                ahead = tl.load(logits + following * stride + place, eviction_policy="evict_last")
            lse = shift + tl.log(mass)
            chosen = _wide(chosen, None, cap, CAPPED, WIDE)
            loss = _loss(
                chosen, tl.sum(sums, axis=0), lse, factor, weights, spread, smoothing, z_loss, SMOOTH, Z
            )
            kept += loss
            if losses is not None:
                tl.store(losses + row + one, loss.to(losses.dtype.element_ty))
            if lses is not None:
                tl.store(lses + row, lse)
            if gradient is not None:
                multiplier = scale * _multiplier(lse, factor, weights, spread, smoothing, z_loss, SMOOTH, Z)
                hit = scale * factor
                if SMOOTH:
                    hit = hit * (1.0 - smoothing)
                for number in range(blocks):
                    first = whole - BLOCK - number * BLOCK
                    column = first + place
                    raw = tl.load(source + column, eviction_policy="evict_first")
                    out = _row_gradient(
                        raw, column, None, weight, lse, multiplier, spread * scale, cap, SMOOTH, CAPPED, WIDE
                    )
                    if not QUICK:
                        out = tl.where(column == label, out - hit, out)
                    elif (label >= first) & (label < first + BLOCK):
                        out = tl.where(column == label, out - hit, out)
                    if CAPPED:
                        out *= _slope(raw, cap, WIDE)
                    tl.store(sink + column, out.to(gradient.dtype.element_ty), cache_modifier=".cs")
                if whole < columns:
                    raw = tl.load(source + last, mask=in_last, other=0.0, eviction_policy="evict_first")
                    out = _row_gradient(
                        raw, last, in_last, weight, lse, multiplier, spread * scale, cap, SMOOTH, CAPPED, WIDE
                    )
                    out = tl.where(last == label, out - hit, out)
                    if CAPPED:
                        out *= _slope(raw, cap, WIDE)
                    tl.store(
                        sink + last, out.to(gradient.dtype.element_ty), mask=in_last, cache_modifier=".cs"
                    )
        else:
            if PREFETCH:
                ahead = tl.load(logits + following * stride + place, eviction_policy="evict_last")
            if losses is not None:
                tl.store(losses + row + one, tl.zeros([1], losses.dtype.element_ty))
            if lses is not None:
                tl.store(lses + row + one, tl.zeros([1], WIDE))
            if gradient is not None:
                nothing = tl.zeros([BLOCK // VECTOR, VECTOR], gradient.dtype.element_ty)
                for number in range(blocks):
                    tl.store(sink + number * BLOCK + place, nothing, cache_modifier=".cs")
                tl.store(sink + last, nothing, mask=in_last, cache_modifier=".cs")
    if partials is not None:
        tl.store(partials + tl.program_id(0) + one, kept)


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
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    SMOOTH: tl.constexpr,
    Z: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDE: tl.constexpr,
):
    scale = _scale_of(denominators, parts, PARTS, WIDE)
    weights = _total_weight(weight_total, columns, WIDE)
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
        factor = _factor(label, bad, weight, WIDE)
        grad = tl.load(upstream + row * upstream_stride, mask=row < rows, other=0.0).to(WIDE) * scale
        multiplier = grad * _multiplier(lse, factor, weights, spread, smoothing, z_loss, SMOOTH, Z)
        hit = grad * factor
        if SMOOTH:
            hit = hit * (1.0 - smoothing)
        out = _row_gradient(
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
            out *= _slope(raw, cap, WIDE)
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


# ---------------------------------------------------------------------------------------------
# Softmax


@triton.jit
def softmax_forward(x, y, rows, columns, stride, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr):
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
    x, y, rows, columns, stride, BLOCK: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr
):
    """One row a program, read twice; the second time from the right, where caches hold it still."""
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
        peak, total = _fold(raw.to(WIDE), peak, total)
    shift, mass = _merged(peak, total)
    inverse = 1.0 / mass
    for number in range(blocks):
        column = (blocks - 1 - number) * BLOCK + place
        inside = column < columns
        raw = tl.load(source + column, mask=inside, other=float("-inf"), eviction_policy="evict_first")
        out = tl.exp(raw.to(WIDE) - shift) * inverse
        tl.store(sink + column, out.to(y.dtype.element_ty), mask=inside, cache_modifier=".cs")


@triton.jit
def softmax_backward(
    y, dy, dx, rows, columns, y_stride, dy_stride, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (column < columns)
    value = tl.load(y + row[:, None] * y_stride + column, mask=inside, other=0.0).to(WIDE)
    grad = tl.load(dy + row[:, None] * dy_stride + column, mask=inside, other=0.0).to(WIDE)
    out = value * (grad - tl.sum(value * grad, axis=1)[:, None])
    tl.store(dx + row[:, None] * columns + column, out.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def softmax_backward_long(
    y, dy, dx, rows, columns, y_stride, dy_stride, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    """One row a program, both inputs read twice."""
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
