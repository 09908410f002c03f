"""Cross entropy over rows of logits, with its gradient where that is wanted.

Short rows stay in registers, several at a time. Long rows are read twice by one program: first from the
left for the maximum and the sum of exponentials, then from the right, so that what was read last, and is
still in a cache, comes first. A vocabulary of 128256 in bf16 is 256 KB a row: with one program on each
multiprocessor most of it stays in the first-level cache, and memory sees each logit once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kpt_plugin_triton.kernels.exponentials import exponentials, fold, joined, merged, row_maximum
from kpt_plugin_triton.kernels.loss_terms import (
    cap_slope,
    class_factor,
    logits_as_counted,
    plain_sums,
    row_gradient,
    row_loss,
    row_multiplier,
    scale_of,
    total_weight,
)
from kpt_plugin_triton.kernels.units import whole_units


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
    out = tl.sum(kept, axis=0) * scale_of(denominators, parts, PARTS, WIDE)
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
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    SMOOTH: tl.constexpr,
    Z: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Losses and gradients of ROWS rows at a time; ``gradient`` may be ``logits`` if that is contiguous.

    ``columns`` and ``stride`` are multiples of UNIT.
    """
    columns = whole_units(columns, UNIT)
    stride = whole_units(stride, UNIT)
    scale = scale_of(denominators, parts, PARTS, WIDE)
    weights = total_weight(weight_total, columns, WIDE)
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
        factor = class_factor(label, bad, weight, WIDE)
        value = logits_as_counted(raw, inside, cap, CAPPED, WIDE)
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
            plain = plain_sums(value, column, inside, weight, WIDE)
        loss = row_loss(chosen, plain, lse, factor, weights, spread, smoothing, z_loss, SMOOTH, Z)
        loss = tl.where(counts, loss, 0.0)
        kept += loss
        if losses is not None:
            tl.store(losses + row, loss.to(losses.dtype.element_ty), mask=row < rows)
        if lses is not None:
            tl.store(lses + row, lse, mask=row < rows)
        if gradient is not None:
            multiplier = row_multiplier(lse, factor, weights, spread, smoothing, z_loss, SMOOTH, Z)
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
    UNIT: tl.constexpr,
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
    of columns is a multiple of VECTOR; columns and ``stride`` are multiples of UNIT.
    """
    columns = whole_units(columns, UNIT)
    stride = whole_units(stride, UNIT)
    scale = scale_of(denominators, parts, PARTS, WIDE)
    weights = total_weight(weight_total, columns, WIDE)
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
            factor = class_factor(label, bad, weight, WIDE)
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
                        total += tl.sum(exponentials(value, shifts), axis=1)
                    total += tl.sum(exponentials(ahead.to(WIDE), shifts), axis=1)
                    if whole < columns:
                        raw = tl.load(
                            source + last, mask=in_last, other=float("-inf"), eviction_policy="evict_last"
                        )
                        total += tl.sum(exponentials(raw.to(WIDE), shifts), axis=1)
                    # Beyond 2**64 a sum may weigh more than what exponentials of other shifts still show.
                    total = tl.where(total < 1.8446744073709552e19, total, float("inf"))
                    shift, mass = tl.reduce((shifts, total), 0, joined)
                    tries -= 1
                    if mass < float("inf"):
                        tries = 0
                    if tries > 0:
                        highest = row_maximum(source, place, last, in_last, blocks, BLOCK, WIDE)
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
                    value = logits_as_counted(raw, in_last, cap, CAPPED, WIDE)
                    peak, total = fold(value, peak, total)
                    if SMOOTH:
                        sums += plain_sums(value, last, in_last, weight, WIDE)
                for number in range(1, blocks):
                    value = logits_as_counted(ahead, None, cap, CAPPED, WIDE)
                    ahead = tl.load(source + number * BLOCK + place, eviction_policy="evict_last")
                    peak, total = fold(value, peak, total)
                    if SMOOTH:
                        sums += plain_sums(value, (number - 1) * BLOCK + place, None, weight, WIDE)
                value = logits_as_counted(ahead, None, cap, CAPPED, WIDE)
                peak, total = fold(value, peak, total)
                if SMOOTH:
                    sums += plain_sums(value, whole - BLOCK + place, None, weight, WIDE)
                shift, mass = merged(peak, total)
            if PREFETCH:
                ahead = tl.load(logits + following * stride + place, eviction_policy="evict_last")
            lse = shift + tl.log(mass)
            chosen = logits_as_counted(chosen, None, cap, CAPPED, WIDE)
            loss = row_loss(
                chosen, tl.sum(sums, axis=0), lse, factor, weights, spread, smoothing, z_loss, SMOOTH, Z
            )
            kept += loss
            if losses is not None:
                tl.store(losses + row + one, loss.to(losses.dtype.element_ty))
            if lses is not None:
                tl.store(lses + row, lse)
            if gradient is not None:
                multiplier = scale * row_multiplier(
                    lse, factor, weights, spread, smoothing, z_loss, SMOOTH, Z
                )
                hit = scale * factor
                if SMOOTH:
                    hit = hit * (1.0 - smoothing)
                for number in range(blocks):
                    first = whole - BLOCK - number * BLOCK
                    column = first + place
                    raw = tl.load(source + column, eviction_policy="evict_first")
                    out = row_gradient(
                        raw, column, None, weight, lse, multiplier, spread * scale, cap, SMOOTH, CAPPED, WIDE
                    )
                    if not QUICK:
                        out = tl.where(column == label, out - hit, out)
                    elif (label >= first) & (label < first + BLOCK):
                        out = tl.where(column == label, out - hit, out)
                    if CAPPED:
                        out *= cap_slope(raw, cap, WIDE)
                    tl.store(sink + column, out.to(gradient.dtype.element_ty), cache_modifier=".cs")
                if whole < columns:
                    raw = tl.load(source + last, mask=in_last, other=0.0, eviction_policy="evict_first")
                    out = row_gradient(
                        raw, last, in_last, weight, lse, multiplier, spread * scale, cap, SMOOTH, CAPPED, WIDE
                    )
                    out = tl.where(last == label, out - hit, out)
                    if CAPPED:
                        out *= cap_slope(raw, cap, WIDE)
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
