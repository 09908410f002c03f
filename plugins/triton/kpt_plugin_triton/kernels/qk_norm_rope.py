"""qk_norm_rope: rms_norm over each head of queries and keys, then the rotation, in one launch each way.

The layout of work is that of `kernels.rope`. Backward programs are persistent and take either queries or
keys; the statistics are computed again from the heads, which have to be read anyway. Each program keeps its
own sum of the weight's gradient; `weight_sums` adds them up in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kpt_plugin_triton.kernels.rope import load_pairs, store_pairs, turn, turn_tile


@triton.jit
def _load_weight(
    weight,
    offset,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The weight of first and of second members, [1, BLOCK] each."""
    one = tl.zeros([1, BLOCK], WIDE) + 1.0
    other = one
    if weight is not None:
        start = weight + tl.zeros([1], tl.int32)
        one, other = load_pairs(start, tl.full([1], 1, tl.int1), HALF, BLOCK, 1, INTERLEAVED, WIDE)
        one += offset
        other += offset
    return one, other


@triton.jit
def _load_rest(
    start, inside, WIDTH: tl.constexpr, FROM: tl.constexpr, REST: tl.constexpr, WIDE: tl.constexpr
):
    column = FROM + tl.arange(0, REST)
    mask = inside[:, None] & (column < WIDTH)[None, :]
    return tl.load(start[:, None] + column[None, :], mask=mask, other=0.0).to(WIDE)


@triton.jit
def _store_rest(start, inside, value, WIDTH: tl.constexpr, FROM: tl.constexpr, REST: tl.constexpr):
    column = FROM + tl.arange(0, REST)
    mask = inside[:, None] & (column < WIDTH)[None, :]
    tl.store(start[:, None] + column[None, :], value.to(start.dtype.element_ty), mask=mask)


@triton.jit
def qk_norm_rope_forward(
    q,
    k,
    q_weight,
    k_weight,
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
    eps,
    offset,
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
    MANY: tl.constexpr,
    WIDE: tl.constexpr,
):
    program = tl.program_id(0)
    of_q = tl.cdiv(tokens, Q_TOKENS) * ((Q_COUNT + Q_HEADS - 1) // Q_HEADS)
    if program < of_q:
        turn_tile(
            q, q_weight, q_out, cos, sin, program, tokens, sequence, q_batch, q_head, q_token,
            table_batch, table_token, eps, offset, Q_COUNT, WIDTH, HALF, BLOCK, REST, Q_TOKENS,
            Q_HEADS, Q_FLAT, Q_EVEN, Q_TOKEN_MAJOR,
            INTERLEAVED, False, True, False, MANY, WIDE,
        )  # fmt: skip
    else:
        turn_tile(
            k, k_weight, k_out, cos, sin, program - of_q, tokens, sequence, k_batch, k_head, k_token,
            table_batch, table_token, eps, offset, K_COUNT, WIDTH, HALF, BLOCK, REST, K_TOKENS,
            K_HEADS, K_FLAT, K_EVEN, K_TOKEN_MAJOR,
            INTERLEAVED, False, True, False, MANY, WIDE,
        )  # fmt: skip


@triton.jit
def _backward_heads(
    x,
    dy,
    weight,
    cos,
    sin,
    dx,
    sums,
    unit_from,
    unit_step,
    tokens,
    sequence,
    heads,
    x_batch,
    x_head,
    x_token,
    dy_batch,
    dy_head,
    dy_token,
    table_batch,
    table_token,
    eps,
    offset,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    TOKEN_MAJOR: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr,
):
    weight_first, weight_second = _load_weight(weight, offset, HALF, BLOCK, INTERLEAVED, WIDE)
    sum_first = tl.zeros([TOKENS, BLOCK], WIDE)
    sum_second = tl.zeros([TOKENS, BLOCK], WIDE)
    if REST > 0:
        sum_rest = tl.zeros([TOKENS, REST], WIDE)
        weight_rest = tl.zeros([1, REST], WIDE) + 1.0
        if weight is not None:
            start = weight + tl.zeros([1], tl.int32)
            weight_rest = _load_rest(start, tl.full([1], 1, tl.int1), WIDTH, 2 * HALF, REST, WIDE) + offset
    groups = tl.cdiv(heads, HEADS)
    units = tl.cdiv(tokens, TOKENS) * groups
    for unit in range(unit_from, units, unit_step):
        group = unit % groups
        token = (unit // groups) * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
        inside = token < tokens
        batch = token // sequence
        place = token % sequence
        table = batch * table_batch + place * table_token
        cos_first, cos_second = load_pairs(cos + table, inside, HALF, BLOCK, TOKENS, INTERLEAVED, WIDE)
        sin_first, sin_second = load_pairs(sin + table, inside, HALF, BLOCK, TOKENS, INTERLEAVED, WIDE)
        if TOKEN_MAJOR:
            target = token * (heads * WIDTH)
            out_head = WIDTH
        else:
            target = (batch * heads * sequence + place) * WIDTH
            out_head = sequence * WIDTH
        source = batch * x_batch + place * x_token
        upstream = batch * dy_batch + place * dy_token
        for head in range(group * HEADS, tl.minimum(group * HEADS + HEADS, heads)):
            read = x + (source + head * x_head)
            grads = dy + (upstream + head * dy_head)
            write = dx + (target + head * out_head)
            first, second = load_pairs(read, inside, HALF, BLOCK, TOKENS, INTERLEAVED, WIDE)
            one, other = load_pairs(grads, inside, HALF, BLOCK, TOKENS, INTERLEAVED, WIDE)
            one, other = turn(one, other, cos_first, cos_second, sin_first, sin_second, True)
            squares = tl.sum(first * first + second * second, axis=1)
            if REST > 0:
                rest = _load_rest(read, inside, WIDTH, 2 * HALF, REST, WIDE)
                grad_rest = _load_rest(grads, inside, WIDTH, 2 * HALF, REST, WIDE)
                squares += tl.sum(rest * rest, axis=1)
            inverse = tl.rsqrt(squares / WIDTH + eps)[:, None]
            first *= inverse
            second *= inverse
            sum_first += one * first
            sum_second += other * second
            one *= weight_first
            other *= weight_second
            along = tl.sum(one * first + other * second, axis=1)
            if REST > 0:
                rest *= inverse
                sum_rest += grad_rest * rest
                grad_rest *= weight_rest
                along += tl.sum(grad_rest * rest, axis=1)
            shared = (along / WIDTH)[:, None]
            one = (one - first * shared) * inverse
            other = (other - second * shared) * inverse
            store_pairs(write, inside, one, other, HALF, BLOCK, TOKENS, INTERLEAVED)
            if REST > 0:
                grad_rest = (grad_rest - rest * shared) * inverse
                _store_rest(write, inside, grad_rest, WIDTH, 2 * HALF, REST)
    if weight is not None:
        start = sums + tl.zeros([1], tl.int32)
        always = tl.full([1], 1, tl.int1)
        one = tl.sum(sum_first, axis=0)[None, :]
        other = tl.sum(sum_second, axis=0)[None, :]
        store_pairs(start, always, one, other, HALF, BLOCK, 1, INTERLEAVED)
        if REST > 0:
            _store_rest(start, always, tl.sum(sum_rest, axis=0)[None, :], WIDTH, 2 * HALF, REST)


@triton.jit
def qk_norm_rope_backward(
    q,
    k,
    dq_out,
    dk_out,
    q_weight,
    k_weight,
    cos,
    sin,
    dq,
    dk,
    sums,
    q_programs,
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
    dq_batch,
    dq_head,
    dq_token,
    dk_batch,
    dk_head,
    dk_token,
    table_batch,
    table_token,
    eps,
    offset,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    Q_TOKEN_MAJOR: tl.constexpr,
    K_TOKEN_MAJOR: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Programs before ``q_programs`` take the queries, the others the keys; sums is [programs, WIDTH]."""
    program = tl.program_id(0).to(tl.int64)
    if program < q_programs:
        _backward_heads(
            q,
            dq_out,
            q_weight,
            cos,
            sin,
            dq,
            sums + program * WIDTH,
            program,
            q_programs,
            tokens,
            sequence,
            q_heads,
            q_batch,
            q_head,
            q_token,
            dq_batch,
            dq_head,
            dq_token,
            table_batch,
            table_token,
            eps,
            offset,
            WIDTH,
            HALF,
            BLOCK,
            REST,
            HEADS,
            TOKENS,
            Q_TOKEN_MAJOR,
            INTERLEAVED,
            WIDE,
        )
    else:
        _backward_heads(
            k,
            dk_out,
            k_weight,
            cos,
            sin,
            dk,
            sums + program * WIDTH,
            program - q_programs,
            tl.num_programs(0) - q_programs,
            tokens,
            sequence,
            k_heads,
            k_batch,
            k_head,
            k_token,
            dk_batch,
            dk_head,
            dk_token,
            table_batch,
            table_token,
            eps,
            offset,
            WIDTH,
            HALF,
            BLOCK,
            REST,
            HEADS,
            TOKENS,
            K_TOKEN_MAJOR,
            INTERLEAVED,
            WIDE,
        )


@triton.jit
def weight_sums(
    sums,
    dq_weight,
    dk_weight,
    q_programs,
    programs,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Add up [programs, WIDTH]: program 0 the queries' part, program 1 the keys'."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = column < WIDTH
    keys = tl.program_id(0)
    row_from = keys * q_programs
    row_to = q_programs + keys * (programs - q_programs)
    total = tl.zeros([ROWS, BLOCK], WIDE)
    for start in range(row_from, row_to, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < row_to)[:, None] & in_row[None, :]
        total += tl.load(sums + row[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
    result = tl.sum(total, axis=0)
    if keys == 0:
        if dq_weight is not None:
            tl.store(dq_weight + column, result.to(dq_weight.dtype.element_ty), mask=in_row)
    else:
        if dk_weight is not None:
            tl.store(dk_weight + column, result.to(dk_weight.dtype.element_ty), mask=in_row)
