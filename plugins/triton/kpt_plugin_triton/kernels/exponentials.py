"""Sums of exponentials that run along a row, over a shift that keeps them finite."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fold(value, peak, total):
    """Take ``value`` [R, V] into running maxima and sums of exponentials [R]."""
    higher = tl.maximum(peak, tl.max(value, axis=1))
    # any finite shift will do while all is -inf, and -inf - -inf would be NaN
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    total = total * tl.exp(peak - shift) + tl.sum(tl.exp(value - shift[:, None]), axis=1)
    return higher, total


@triton.jit
def merged(peak, total):
    """(finite shift, sum of exponentials over it) of all running pairs [R]."""
    highest = tl.max(peak, axis=0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    return shift, tl.sum(total * tl.exp(peak - shift), axis=0)


@triton.jit
def exponentials(value, shift):
    """exp(value - shift), [R, V] and [R], by one fused multiply-add and one power of two for each."""
    LOG2E: tl.constexpr = 1.4426950408889634
    return tl.exp2(value * LOG2E - (shift * LOG2E)[:, None])


@triton.jit
def joined(shift, total, other_shift, other_total):
    """Two sums of exponentials over their (finite) shifts, as one."""
    higher = tl.maximum(shift, other_shift)
    total = total * tl.exp(shift - higher) + other_total * tl.exp(other_shift - higher)
    return higher, total


@triton.jit
def row_maximum(source, place, last, in_last, blocks, BLOCK: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """The maximum of a row of logits; 0 where that is -inf, as any finite shift will do then."""
    raw = tl.load(source + last, mask=in_last, other=float("-inf"))
    peak = tl.max(raw.to(WIDE), axis=1)
    for number in range(blocks):
        raw = tl.load(source + number * BLOCK + place)
        peak = tl.maximum(peak, tl.max(raw.to(WIDE), axis=1))
    highest = tl.max(peak, axis=0)
    return tl.where(highest == float("-inf"), 0.0, highest)
