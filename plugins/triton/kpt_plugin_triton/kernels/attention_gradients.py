"""What both kernels of attention's backward pass need: delta, and the gradient of scores.

Both compute probabilities again from the scores and the forward's statistics. The gradient of a score is
p * (dp - delta), with delta the sum over features of out * dout.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kpt_plugin_triton.kernels.attention import (
    LOG2E,
    bounded,
)


@triton.jit
def attention_delta(
    out,
    dout,
    delta,
    heads,
    q_len,
    starts_q,
    out_b,
    out_h,
    out_r,
    dout_b,
    dout_h,
    dout_r,
    stats_b,
    stats_h,
    HEAD_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
):
    """delta = sum(out * dout) over features, laid out as the statistics are."""
    # one dimension: the others of a grid end at 65535
    blocks = tl.cdiv(q_len, ROWS)
    block = tl.program_id(0) % blocks
    both = tl.program_id(0) // blocks
    batch = tl.cast(both // heads, tl.int64)
    head = tl.cast(both % heads, tl.int64)
    at = batch * out_b
    dat = batch * dout_b
    place = batch * stats_b
    if starts_q is not None:
        first = tl.load(starts_q + batch).to(tl.int64)
        q_len = (tl.load(starts_q + batch + 1) - first).to(tl.int32)
        at = first * out_r
        dat = first * dout_r
        place = first
    row = block * ROWS + tl.arange(0, ROWS)
    wide = tl.cast(row, tl.int64)[:, None]
    column = tl.arange(0, BLOCK_V)[None, :]
    inside = (row < q_len)[:, None] & (column < HEAD_V)
    a = tl.load(out + at + head * out_h + wide * out_r + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(dout + dat + head * dout_h + wide * dout_r + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(delta + place + head * stats_h + row, tl.sum(a * b, 1), mask=row < q_len)


@triton.jit
def gradient_of_scores(
    raw,
    dweights,
    level,
    inverse,
    given,
    keep,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    ADDITIVE: tl.constexpr,
    HIDES: tl.constexpr,
    ACCURATE: tl.constexpr,
):
    """(probabilities, gradient of the scores before scaling but for the factor ``scale``).

    ``raw`` are scores before scaling, ``dweights`` the gradient of the probabilities less delta.
    """
    if SOFTCAP:
        capped = bounded(raw * (scale / LOG2E), softcap, ACCURATE)
        scores = capped * LOG2E
    else:
        scores = raw * scale
    if ADDITIVE:
        scores += given
    if HIDES:
        scores = tl.where(keep, scores, float("-inf"))
    weights = tl.exp2(scores - level)
    if ADDITIVE:
        weights *= inverse
    gradient = weights * dweights
    if SOFTCAP:
        slope = capped / softcap
        gradient *= 1.0 - slope * slope
    return weights, gradient
