"""rope: rotate the queries and keys of all heads in one launch.

A program takes some heads of some tokens, of the queries or of the keys, all at once: every load is under
way before the first store. It reads cos and sin of a token once for its heads. The two members of a pair
stand R/2 apart (halves) or side by side (interleaved); each has its own cos and sin, as in the reference.
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
def _read(place, mask, FULL: tl.constexpr, POLICY: tl.constexpr):
    """What stands at ``place``, zero outside; FULL: nothing is outside."""
    if FULL:
        value = tl.load(place, eviction_policy=POLICY)
    else:
        value = tl.load(place, mask=mask, other=0.0, eviction_policy=POLICY)
    return value


@triton.jit
def _write(place, value, mask, FULL: tl.constexpr):
    if FULL:
        tl.store(place, value)
    else:
        tl.store(place, value, mask=mask)


@triton.jit
def _load_members(
    start,
    inside,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FULL: tl.constexpr,
    POLICY: tl.constexpr,
    WIDE: tl.constexpr,
):
    """First and second members, [TOKENS, HEADS, BLOCK] each, of rows that begin at ``start``."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK)[None, None, :]
        mask = inside[:, :, None] & (column < 2 * HALF)
        both = _read(start[:, :, None] + column, mask, FULL, POLICY).to(WIDE)
        first, second = tl.split(tl.reshape(both, [TOKENS, HEADS, BLOCK, 2]))
    else:
        column = tl.arange(0, BLOCK)[None, None, :]
        mask = inside[:, :, None] & (column < HALF)
        place = start[:, :, None] + column
        first = _read(place, mask, FULL, POLICY).to(WIDE)
        second = _read(place + HALF, mask, FULL, POLICY).to(WIDE)
    return first, second


@triton.jit
def _store_members(
    start,
    inside,
    first,
    second,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FULL: tl.constexpr,
):
    kind: tl.constexpr = start.dtype.element_ty
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK)[None, None, :]
        mask = inside[:, :, None] & (column < 2 * HALF)
        both = tl.reshape(tl.join(first.to(kind), second.to(kind)), [TOKENS, HEADS, 2 * BLOCK])
        _write(start[:, :, None] + column, both, mask, FULL)
    else:
        column = tl.arange(0, BLOCK)[None, None, :]
        mask = inside[:, :, None] & (column < HALF)
        place = start[:, :, None] + column
        _write(place, first.to(kind), mask, FULL)
        _write(place + HALF, second.to(kind), mask, FULL)


@triton.jit
def _weight_members(
    weight, offset, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr, WIDE: tl.constexpr
):
    """The weight of first and of second members, [1, 1, BLOCK] each."""
    start = weight + tl.zeros([1, 1], tl.int32)
    always = tl.full([1, 1], 1, tl.int1)
    first, second = _load_members(
        start, always, HALF, BLOCK, 1, 1, INTERLEAVED, HALF == BLOCK, "evict_last", WIDE
    )
    return first + offset, second + offset


@triton.jit
def _turn_whole(
    source,
    target,
    cos,
    sin,
    inside,
    known,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    INVERSE: tl.constexpr,
    FULL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Rows of 2 HALF features, read and written in one piece; partners come from other threads."""
    column = tl.arange(0, 2 * HALF)[None, None, :]
    partner = column ^ HALF
    mask = inside[:, :, None]
    value = _read(source[:, :, None] + column, mask, FULL, "").to(WIDE)
    other = tl.gather(value, tl.broadcast_to(partner, [TOKENS, HEADS, 2 * HALF]), 2)
    present = known[:, :, None]
    along = _read(cos[:, :, None] + column, present, FULL, "evict_last").to(WIDE)
    across = _read(sin[:, :, None] + column, present, FULL, "evict_last").to(WIDE)
    across = tl.where(column < HALF, -across, across)
    if INVERSE:
        across = tl.gather(across, tl.broadcast_to(partner, [TOKENS, 1, 2 * HALF]), 2)
    out = value * along + other * across
    _write(target[:, :, None] + column, out.to(target.dtype.element_ty), mask, FULL)


@triton.jit
def turn_tile(
    x,
    weight,
    out,
    cos,
    sin,
    number,
    tokens,
    sequence,
    x_batch,
    x_head,
    x_token,
    table_batch,
    table_token,
    eps,
    offset,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    FLAT: tl.constexpr,
    EVEN: tl.constexpr,
    TOKEN_MAJOR: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    NORMED: tl.constexpr,
    WHOLE: tl.constexpr,
    MANY: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Tile ``number`` of x: TOKENS x HEADS rows, if NORMED over their root mean square and times the weight.

    x has COUNT heads. FLAT: the tokens of its batch entries follow one another. EVEN: tiles end where x does.
    ``out`` is [B, S, H, D] in memory if TOKEN_MAJOR, else [B, H, S, D]. WHOLE: see `_turn_whole`.
    MANY: numbers of tokens take 64 bits, in which a division takes long.
    """
    if MANY:
        number = tl.cast(number, tl.int64)
    groups: tl.constexpr = 1 if COUNT == 0 else (COUNT + HEADS - 1) // HEADS
    token = number // groups * TOKENS + tl.arange(0, TOKENS)
    head = tl.cast(number % groups * HEADS + tl.arange(0, HEADS), tl.int64)
    present = token < tokens
    inside = present[:, None] & (head < COUNT)[None, :]
    full: tl.constexpr = EVEN and HALF == BLOCK
    batch = tl.cast(token // sequence, tl.int64)
    place = tl.cast(token % sequence, tl.int64)
    table = (batch * table_batch + place * table_token)[:, None]
    known = present[:, None]
    if FLAT:  # which waits for no division
        row = tl.cast(token, tl.int64) * x_token
    else:
        row = batch * x_batch + place * x_token
    source = x + (row[:, None] + (head * x_head)[None, :])
    if TOKEN_MAJOR:
        target = out + ((tl.cast(token, tl.int64) * COUNT)[:, None] + head[None, :]) * WIDTH
    else:
        target = (
            out + ((batch * COUNT)[:, None] + head[None, :]) * sequence * WIDTH + (place * WIDTH)[:, None]
        )
    if WHOLE:
        tl.static_assert(not (NORMED or INTERLEAVED) and HALF == BLOCK and REST == 0)
        _turn_whole(
            source, target, cos + table, sin + table, inside, known, HALF, TOKENS, HEADS, INVERSE, full, WIDE
        )
    else:
        first, second = _load_members(source, inside, HALF, BLOCK, TOKENS, HEADS, INTERLEAVED, full, "", WIDE)
        cos_first, cos_second = _load_members(
            cos + table, known, HALF, BLOCK, TOKENS, 1, INTERLEAVED, full, "evict_last", WIDE
        )
        sin_first, sin_second = _load_members(
            sin + table, known, HALF, BLOCK, TOKENS, 1, INTERLEAVED, full, "evict_last", WIDE
        )
        if REST > 0:  # features that do not turn
            column = 2 * HALF + tl.arange(0, REST)
            in_rest = inside[:, :, None] & (column < WIDTH)[None, None, :]
            rest = tl.load(source[:, :, None] + column[None, None, :], mask=in_rest, other=0.0)
        if NORMED:
            squares = tl.sum(first * first + second * second, axis=2)
            if REST > 0:
                wide = rest.to(WIDE)
                squares += tl.sum(wide * wide, axis=2)
            inverse = tl.rsqrt(squares / WIDTH + eps)[:, :, None]
            first = first * inverse
            second = second * inverse
            if weight is not None:
                weight_first, weight_second = _weight_members(weight, offset, HALF, BLOCK, INTERLEAVED, WIDE)
                first = first * weight_first
                second = second * weight_second
            if REST > 0:
                wide = wide * inverse
                if weight is not None:
                    factor = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(WIDE) + offset
                    wide = wide * factor[None, None, :]
                rest = wide.to(rest.dtype)
        one, other = turn(first, second, cos_first, cos_second, sin_first, sin_second, INVERSE)
        _store_members(target, inside, one, other, HALF, BLOCK, TOKENS, HEADS, INTERLEAVED, full)
        if REST > 0:
            tl.store(target[:, :, None] + column[None, None, :], rest, mask=in_rest)


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
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    table_batch,
    table_token,
    Q_COUNT: tl.constexpr,
    K_COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    Q_TOKENS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_TOKENS: tl.constexpr,
    K_HEADS: tl.constexpr,
    Q_FLAT: tl.constexpr,
    K_FLAT: tl.constexpr,
    Q_EVEN: tl.constexpr,
    K_EVEN: tl.constexpr,
    Q_TOKEN_MAJOR: tl.constexpr,
    K_TOKEN_MAJOR: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    WHOLE: tl.constexpr,
    MANY: tl.constexpr,
    WIDE: tl.constexpr,
):
    program = tl.program_id(0)
    of_q = tl.cdiv(tokens, Q_TOKENS) * ((Q_COUNT + Q_HEADS - 1) // Q_HEADS)
    if program < of_q:
        turn_tile(
            q, None, q_out, cos, sin, program, tokens, sequence, q_batch, q_head, q_token,
            table_batch, table_token, 0.0, 0.0, Q_COUNT, WIDTH, HALF, BLOCK, REST, Q_TOKENS,
            Q_HEADS, Q_FLAT, Q_EVEN, Q_TOKEN_MAJOR,
            INTERLEAVED, INVERSE, False, WHOLE, MANY, WIDE,
        )  # fmt: skip
    else:
        turn_tile(
            k, None, k_out, cos, sin, program - of_q, tokens, sequence, k_batch, k_head, k_token,
            table_batch, table_token, 0.0, 0.0, K_COUNT, WIDTH, HALF, BLOCK, REST, K_TOKENS,
            K_HEADS, K_FLAT, K_EVEN, K_TOKEN_MAJOR,
            INTERLEAVED, INVERSE, False, WHOLE, MANY, WIDE,
        )  # fmt: skip
