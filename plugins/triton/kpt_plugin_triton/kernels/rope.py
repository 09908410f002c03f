"""rope: rotate the queries and keys of all heads in one launch.

A program takes a block of tokens and some heads of the queries or of the keys. It reads cos and sin of its
tokens once and keeps them in registers while it walks over the heads. The two members of a pair stand R/2
apart (halves) or side by side (interleaved); each has its own cos and sin, as in the reference.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_pairs(
    start,
    inside,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """First and second members, [TOKENS, BLOCK] each, of rows that begin at the pointers ``start``."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK)
        mask = inside[:, None] & (column < 2 * HALF)[None, :]
        both = tl.load(start[:, None] + column[None, :], mask=mask, other=0.0).to(WIDE)
        first, second = tl.split(tl.reshape(both, [TOKENS, BLOCK, 2]))
    else:
        column = tl.arange(0, BLOCK)
        mask = inside[:, None] & (column < HALF)[None, :]
        first = tl.load(start[:, None] + column[None, :], mask=mask, other=0.0).to(WIDE)
        second = tl.load(start[:, None] + (HALF + column)[None, :], mask=mask, other=0.0).to(WIDE)
    return first, second


@triton.jit
def store_pairs(
    start,
    inside,
    first,
    second,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    kind: tl.constexpr = start.dtype.element_ty
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK)
        mask = inside[:, None] & (column < 2 * HALF)[None, :]
        both = tl.reshape(tl.join(first.to(kind), second.to(kind)), [TOKENS, 2 * BLOCK])
        tl.store(start[:, None] + column[None, :], both, mask=mask)
    else:
        column = tl.arange(0, BLOCK)
        mask = inside[:, None] & (column < HALF)[None, :]
        tl.store(start[:, None] + column[None, :], first.to(kind), mask=mask)
        tl.store(start[:, None] + (HALF + column)[None, :], second.to(kind), mask=mask)


@triton.jit
def turn(first, second, cos_first, cos_second, sin_first, sin_second, INVERSE: tl.constexpr):
    """The pairs rotated; with INVERSE multiplied by the transposed matrix, which is the gradient."""
    if INVERSE:
        one = first * cos_first + second * sin_second
        other = second * cos_second - first * sin_first
    else:
        one = first * cos_first - second * sin_first
        other = second * cos_second + first * sin_second
    return one, other


@triton.jit
def _rotate_heads(
    x,
    out,
    cos_first,
    cos_second,
    sin_first,
    sin_second,
    inside,
    source,
    target,
    head_from,
    head_to,
    x_head,
    out_head,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    TOKENS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    WIDE: tl.constexpr,
):
    for head in range(head_from, head_to):
        read = x + (source + head * x_head)
        write = out + (target + head * out_head)
        first, second = load_pairs(read, inside, HALF, BLOCK, TOKENS, INTERLEAVED, WIDE)
        one, other = turn(first, second, cos_first, cos_second, sin_first, sin_second, INVERSE)
        store_pairs(write, inside, one, other, HALF, BLOCK, TOKENS, INTERLEAVED)
        if REST > 0:  # features that do not turn
            column = 2 * HALF + tl.arange(0, REST)
            mask = inside[:, None] & (column < WIDTH)[None, :]
            same = tl.load(read[:, None] + column[None, :], mask=mask, other=0.0)
            tl.store(write[:, None] + column[None, :], same, mask=mask)


@triton.jit
def rope(
    q,
    k,
    cos,
    sin,
    q_out,
    k_out,
    tokens,
    sequence,
    q_heads,
    k_heads,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    table_batch,
    table_token,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    Q_TOKEN_MAJOR: tl.constexpr,
    K_TOKEN_MAJOR: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    WIDE: tl.constexpr,
):
    q_groups = tl.cdiv(q_heads, HEADS)
    groups = q_groups + tl.cdiv(k_heads, HEADS)
    program = tl.program_id(0).to(tl.int64)
    group = program % groups  # groups of one block of tokens run side by side: they share cos and sin
    token = (program // groups) * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    batch = token // sequence
    place = token % sequence
    table = batch * table_batch + place * table_token
    cos_first, cos_second = load_pairs(cos + table, inside, HALF, BLOCK, TOKENS, INTERLEAVED, WIDE)
    sin_first, sin_second = load_pairs(sin + table, inside, HALF, BLOCK, TOKENS, INTERLEAVED, WIDE)
    if group < q_groups:
        if Q_TOKEN_MAJOR:  # [B, S, H, D] in memory
            q_target = token * (q_heads * WIDTH)
            q_out_head = WIDTH
        else:
            q_target = (batch * q_heads * sequence + place) * WIDTH
            q_out_head = sequence * WIDTH
        q_from = group * HEADS
        _rotate_heads(
            q,
            q_out,
            cos_first,
            cos_second,
            sin_first,
            sin_second,
            inside,
            batch * q_batch + place * q_token,
            q_target,
            q_from,
            tl.minimum(q_from + HEADS, q_heads),
            q_head,
            q_out_head,
            WIDTH,
            HALF,
            BLOCK,
            REST,
            TOKENS,
            INTERLEAVED,
            INVERSE,
            WIDE,
        )
    else:
        if K_TOKEN_MAJOR:
            k_target = token * (k_heads * WIDTH)
            k_out_head = WIDTH
        else:
            k_target = (batch * k_heads * sequence + place) * WIDTH
            k_out_head = sequence * WIDTH
        k_from = (group - q_groups) * HEADS
        _rotate_heads(
            k,
            k_out,
            cos_first,
            cos_second,
            sin_first,
            sin_second,
            inside,
            batch * k_batch + place * k_token,
            k_target,
            k_from,
            tl.minimum(k_from + HEADS, k_heads),
            k_head,
            k_out_head,
            WIDTH,
            HALF,
            BLOCK,
            REST,
            TOKENS,
            INTERLEAVED,
            INVERSE,
            WIDE,
        )
