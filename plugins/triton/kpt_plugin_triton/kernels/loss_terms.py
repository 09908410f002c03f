"""The terms of a row's loss and gradient.

The loss of a row with label t, weight w and smoothing s over C classes is
``(1 - s) w[t] (lse - x[t]) + s / C sum(w (lse - x)) + z w[t] lse**2``, where ``x`` may be
``cap tanh(x / cap)``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def squashed(value, cap):
    """tanh(value / cap); the exponential may overflow, which gives 1."""
    return 1.0 - 2.0 / (tl.exp(2.0 * value / cap) + 1.0)


@triton.jit
def logits_as_counted(raw, inside, cap, CAPPED: tl.constexpr, WIDE: tl.constexpr):
    """Logits as they count; -inf outside of the row, where ``inside`` is not None."""
    value = raw.to(WIDE)
    if CAPPED:
        value = squashed(value, cap) * cap
        if inside is not None:
            value = tl.where(inside, value, float("-inf"))
    return value


@triton.jit
def scale_of(denominators, parts, PARTS: tl.constexpr, WIDE: tl.constexpr):
    """One over the sum of up to PARTS partial counts; 1 where there are none."""
    scale = tl.full([], 1.0, WIDE)
    if denominators is not None:
        part = tl.arange(0, PARTS)
        scale = 1.0 / tl.sum(tl.load(denominators + part, mask=part < parts, other=0.0), axis=0)
    return scale


@triton.jit
def class_factor(label, bad, weight, WIDE: tl.constexpr):
    """The weight of the label's class; NaN, instead of a read out of bounds, where there is no such class."""
    if weight is not None:
        factor = tl.load(weight + tl.where(bad, 0, label)).to(WIDE)
    else:
        factor = tl.where(bad, 0.0, 1.0).to(WIDE)
    return tl.where(bad, float("nan"), factor)


@triton.jit
def row_loss(
    chosen, plain_sum, lse, factor, weights, spread, smoothing, z_loss, SMOOTH: tl.constexpr, Z: tl.constexpr
):
    loss = factor * (lse - chosen)
    if SMOOTH:
        loss = (1.0 - smoothing) * loss + spread * (weights * lse - plain_sum)
    if Z:
        loss += z_loss * factor * lse * lse
    return loss


@triton.jit
def row_multiplier(lse, factor, weights, spread, smoothing, z_loss, SMOOTH: tl.constexpr, Z: tl.constexpr):
    """What the probabilities of a row are multiplied by in its gradient."""
    multiplier = factor
    if SMOOTH:
        multiplier = (1.0 - smoothing) * factor + spread * weights
    if Z:
        multiplier += 2.0 * z_loss * factor * lse
    return multiplier


@triton.jit
def total_weight(weight_total, columns, WIDE: tl.constexpr):
    if weight_total is not None:
        weights = tl.load(weight_total).to(WIDE)
    else:
        weights = tl.full([], 1.0, WIDE) * columns
    return weights


@triton.jit
def class_weights(weight, column, inside, WIDE: tl.constexpr):
    if inside is not None:
        found = tl.load(weight + column, mask=inside, other=0.0)
    else:
        found = tl.load(weight + column)
    return found.to(WIDE)


@triton.jit
def row_gradient(
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
        value = squashed(value, cap) * cap
    if SMOOTH or CAPPED:
        out = tl.exp(value - lse) * multiplier
    else:
        out = tl.exp2(value * LOG2E - lse * LOG2E) * multiplier
    if SMOOTH:
        if weight is not None:
            out -= spread * class_weights(weight, column, inside, WIDE)
        else:
            out -= spread
    return out


@triton.jit
def cap_slope(raw, cap, WIDE: tl.constexpr):
    """The derivative of cap * tanh(raw / cap)."""
    unit = squashed(raw.to(WIDE), cap)
    return 1.0 - unit * unit


@triton.jit
def plain_sums(value, column, inside, weight, WIDE: tl.constexpr):
    """Sums of (weighted) logits along the rows of a tile, for label smoothing."""
    if weight is not None:
        value = value * class_weights(weight, column, inside, WIDE)
    if inside is not None:
        value = tl.where(inside, value, 0.0)
    return tl.sum(value, axis=1)
