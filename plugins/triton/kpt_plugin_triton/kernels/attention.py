"""Attention forward: the online softmax of flash attention (Dao 2023, arXiv:2307.08691), in base 2.

A program owns BLOCK_M queries of one head and walks over blocks of keys. Blocks that every query sees in
full are walked without masking; blocks at the edges (diagonal, window, tail) are masked. Keys outside of
the window, behind the diagonal or left out by a block mask are never loaded.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def bounded(x, cap, ACCURATE: tl.constexpr):
    """cap * tanh(x / cap)."""
    ratio = x / cap
    out = 1.0 - 2.0 / (tl.exp2(ratio * (2.0 * LOG2E)) + 1.0)
    if ACCURATE:  # the difference above loses digits near zero
        square = ratio * ratio
        near = ratio * (1.0 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
        out = tl.where(tl.abs(ratio) < 0.25, near, out)
    return out * cap


@triton.jit
def in_base_2(mask):
    """An additive mask times log2(e); a dtype's lowest number stays finite, -inf stays -inf."""
    wide = mask.to(tl.float32)
    return tl.where(wide > -2e38, wide * LOG2E, wide)


@triton.jit
def place_in_section(program, blocks, heads, section):
    """(block, head) of a program; ``section`` heads share the L2 cache, and their block 0 comes first."""
    first = program // (section * blocks) * section
    inside = program % (section * blocks)
    width = tl.minimum(section, heads - first)
    return inside // width, first + inside % width


@triton.jit
def load_tile(
    source,
    start,
    length,
    row_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Rows ``start`` to ``start + ROWS`` of [length, COLUMNS]; zeros beyond, and in columns up to BLOCK."""
    if DESCRIPTORS:
        tile = source.load([start, 0])
    else:
        row = start + tl.arange(0, ROWS)
        column = tl.arange(0, BLOCK)
        address = source + tl.cast(row, tl.int64)[:, None] * row_stride + column[None, :]
        if MASKED and BLOCK != COLUMNS:
            tile = tl.load(address, mask=(row < length)[:, None] & (column < COLUMNS)[None, :], other=0.0)
        elif MASKED:
            tile = tl.load(address, mask=(row < length)[:, None], other=0.0)
        elif BLOCK != COLUMNS:
            tile = tl.load(address, mask=(column < COLUMNS)[None, :], other=0.0)
        else:
            tile = tl.load(address)
    return tile


@triton.jit
def load_mask(mask, row, column, q_len, k_len, mask_r, mask_c, MASK_ROWS: tl.constexpr):
    """The mask at rows x columns, or [1, columns] where all rows have the same."""
    across = tl.cast(column, tl.int64)[None, :] * mask_c
    inside = (column < k_len)[None, :]
    if MASK_ROWS:
        across += tl.cast(row, tl.int64)[:, None] * mask_r
        inside = inside & (row < q_len)[:, None]
    return tl.load(mask + across, mask=inside, other=0)


@triton.jit
def visible(row, column, k_len, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Which of rows x columns (broadcast by the caller) the position alone lets through.

    One comparison for each score, because every condition of its own is a register (a pair of scalar ones
    on AMD); WINDOW implies CAUSAL.
    """
    if CAUSAL:
        last = tl.minimum(row, k_len - 1)
        if WINDOW:  # a key behind the last one gives a negative difference, which is large without its sign
            width = tl.maximum(window - (row - last), 0)
            keep = (last - column).to(tl.uint32) < width.to(tl.uint32)
        else:
            keep = column <= last
    else:
        keep = column < k_len
    return keep


@triton.jit
def key_spans(
    start,
    q_len,
    k_len,
    window,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Key blocks for queries from ``start``: masked [a, b), whole [b, c), masked [c, d)."""
    last = tl.cdiv(k_len, BLOCK_N)
    whole = k_len // BLOCK_N
    first = 0
    inner = 0
    if CAUSAL:
        last = tl.minimum(last, tl.cdiv(start + BLOCK_M, BLOCK_N))
        whole = tl.minimum(whole, (start + 1) // BLOCK_N)
    if WINDOW:
        first = tl.maximum(start - window + 1, 0) // BLOCK_N
        first = tl.minimum(first, last)
        inner = tl.cdiv(tl.maximum(start + BLOCK_M - window, 0), BLOCK_N)
    last = tl.where(start < q_len, last, first)
    if MASKED:
        whole = first + 0
    whole = tl.minimum(tl.maximum(whole, first), last)
    inner = tl.minimum(tl.maximum(inner, first), whole)
    return first, inner, whole, last


@triton.jit
def forward_span(
    out,
    total,
    peak,
    queries,
    keys,
    values,
    mask,
    listed,
    first,
    last,
    row,
    q_len,
    k_len,
    k_r,
    v_r,
    mask_r,
    mask_c,
    window,
    scale,
    softcap,
    HEAD: tl.constexpr,
    HEAD_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    SPARSE_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    GUARD: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Attend to key blocks ``first`` to ``last`` (positions in the list of kept ones, if SPARSE_N)."""
    ADDITIVE: tl.constexpr = mask is not None and mask.dtype.element_ty != tl.uint8
    # Scores stay unscaled until the exponential wherever possible: one fused multiply-add less.
    LATE: tl.constexpr = not SOFTCAP and not ADDITIVE
    for number in range(first, last):
        if SPARSE_N > 0:
            EACH: tl.constexpr = SPARSE_N // BLOCK_N
            start = tl.load(listed + number // EACH) * SPARSE_N + number % EACH * BLOCK_N
        else:
            start = number * BLOCK_N
        key = load_tile(keys, start, k_len, k_r, BLOCK_N, HEAD, BLOCK_D, MASKED, DESCRIPTORS)
        scores = tl.dot(queries, tl.trans(key), input_precision="ieee")
        if SOFTCAP:
            scores = bounded(scores * (scale / LOG2E), softcap, key.dtype == tl.float32) * LOG2E
        elif not LATE:
            scores *= scale
        if MASKED:
            column = start + tl.arange(0, BLOCK_N)
            keep = visible(row[:, None], column[None, :], k_len, window, CAUSAL, WINDOW)
            if mask is not None:
                given = load_mask(mask, row, column, q_len, k_len, mask_r, mask_c, MASK_ROWS)
                if ADDITIVE:
                    scores += in_base_2(given)
                else:
                    keep = keep & (given != 0)
            scores = tl.where(keep, scores, float("-inf"))
        if LATE:
            higher = tl.maximum(peak, tl.max(scores, 1) * scale)
        else:
            higher = tl.maximum(peak, tl.max(scores, 1))
        level = higher
        if GUARD:  # nothing seen so far: -inf minus -inf would be NaN
            level = tl.where(higher == float("-inf"), 0.0, higher)
        if LATE:
            weights = tl.exp2(scores * scale - level[:, None])
        else:
            weights = tl.exp2(scores - level[:, None])
        shrink = tl.exp2(peak - level)
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None]
        value = load_tile(values, start, k_len, v_r, BLOCK_N, HEAD_V, BLOCK_V, MASKED, DESCRIPTORS)
        out = tl.dot(weights.to(value.dtype), value, out, input_precision="ieee")
        peak = higher
    return out, total, peak


@triton.jit(
    do_not_specialize=[
        "heads",
        "all_heads",
        "blocks",
        "section",
        "q_len",
        "k_len",
        "stats_size",
        "lists_b",
        "lists_h",
        "lists_width",
        "window",
    ]
)
def attention_forward(
    q,
    k,
    v,
    mask,
    sinks,
    starts_q,
    starts_k,
    lists,
    counts,
    out,
    stats,
    heads,
    all_heads,
    blocks,
    section,
    q_len,
    k_len,
    q_b,
    q_h,
    q_r,
    k_b,
    k_h,
    k_r,
    v_b,
    v_h,
    v_r,
    out_b,
    out_h,
    out_r,
    mask_b,
    mask_h,
    mask_r,
    mask_c,
    stats_b,
    stats_h,
    stats_size,
    lists_b,
    lists_h,
    lists_width,
    window,
    scale,
    softcap,
    HEAD: tl.constexpr,
    HEAD_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    SPARSE_M: tl.constexpr,
    SPARSE_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """``blocks`` query blocks of each of ``all_heads`` (batch x heads); ``scale`` includes log2(e).

    ``stats`` receives log2 of each row's sum of exponentials (+inf for a row that sees nothing), or, with an
    additive mask, the row's maximum and, ``stats_size`` further on, the inverse of the sum.

    Without SPLIT a single loop masks every block, which takes fewer registers and scalars. Warps with roles
    of their own (``tl.range(warp_specialize=True)``) were a fifth faster on an H200, and wrong: Triton 3.6
    compiles this loop with a race, which the compute sanitizer reports.
    """
    block, both = place_in_section(tl.program_id(0), blocks, all_heads, section)
    if CAUSAL:  # the longest rows first, so that short ones fill the end
        block = blocks - 1 - block
    batch = tl.cast(both // heads, tl.int64)
    head = tl.cast(both % heads, tl.int64)
    q_r = tl.cast(q_r, tl.int64)
    k_r = tl.cast(k_r, tl.int64)
    v_r = tl.cast(v_r, tl.int64)
    q_at = batch * q_b
    k_at = batch * k_b
    v_at = batch * v_b
    out_at = batch * out_b
    stats_at = batch * stats_b
    if starts_q is not None:
        q_start = tl.load(starts_q + batch)
        k_start = tl.load(starts_k + batch)
        q_len = (tl.load(starts_q + batch + 1) - q_start).to(tl.int32)
        k_len = (tl.load(starts_k + batch + 1) - k_start).to(tl.int32)
        q_start = q_start.to(tl.int64)
        k_start = k_start.to(tl.int64)
        q_at = tl.where(q_len > 0, q_start, 0) * q_r
        k_at = tl.where(k_len > 0, k_start, 0) * k_r
        v_at = tl.where(k_len > 0, k_start, 0) * v_r
        out_at = q_start * out_r
        stats_at = q_start
    k_at += head // GROUP * k_h
    v_at += head // GROUP * v_h
    start = block * BLOCK_M
    row = start + tl.arange(0, BLOCK_M)
    if DESCRIPTORS:
        # A descriptor of no rows is an illegal instruction: an empty sequence describes the tensor's
        # first row, which nothing of it looks at.
        q_rows = tl.maximum(q_len, 1)
        k_rows = tl.maximum(k_len, 1)
        all_queries = tl.make_tensor_descriptor(
            q + q_at + head * q_h, [q_rows, HEAD], [q_r, 1], [BLOCK_M, BLOCK_D]
        )
        queries = all_queries.load([start, 0])
        keys = tl.make_tensor_descriptor(k + k_at, [k_rows, HEAD], [k_r, 1], [BLOCK_N, BLOCK_D])
        values = tl.make_tensor_descriptor(v + v_at, [k_rows, HEAD_V], [v_r, 1], [BLOCK_N, BLOCK_V])
    else:
        queries = load_tile(q + q_at + head * q_h, start, q_len, q_r, BLOCK_M, HEAD, BLOCK_D, True, False)
        keys = k + k_at
        values = v + v_at
    if mask is not None:
        mask += batch * mask_b + head * mask_h
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if sinks is not None:
        peak = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2E
        total += 1.0
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    GUARD: tl.constexpr = WINDOW or mask is not None or SPARSE_N > 0 or sinks is not None
    listed = lists
    if SPARSE_N > 0:
        EACH: tl.constexpr = SPARSE_N // BLOCK_N
        one = batch * lists_b + head * lists_h + start // SPARSE_M
        listed += one * lists_width
        first = 0
        inner = 0
        whole = tl.load(counts + 2 * one) * EACH
        last = tl.load(counts + 2 * one + 1) * EACH
        if not SPLIT:
            whole = first
    else:
        first, inner, whole, last = key_spans(
            start, q_len, k_len, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, mask is not None or not SPLIT
        )
    if WINDOW and SPARSE_N == 0 and SPLIT:
        acc, total, peak = forward_span(
            acc, total, peak, queries, keys, values, mask, listed, first, inner, row, q_len, k_len, k_r, v_r,
            mask_r, mask_c, window, scale, softcap, HEAD, HEAD_V, BLOCK_D, BLOCK_V, CAUSAL, WINDOW, SOFTCAP,
            MASK_ROWS, SPARSE_N, BLOCK_N, True, GUARD, DESCRIPTORS,
        )  # fmt: skip
    if mask is None and SPLIT:
        acc, total, peak = forward_span(
            acc, total, peak, queries, keys, values, mask, listed, inner, whole, row, q_len, k_len, k_r, v_r,
            mask_r, mask_c, window, scale, softcap, HEAD, HEAD_V, BLOCK_D, BLOCK_V, CAUSAL, WINDOW, SOFTCAP,
            MASK_ROWS, SPARSE_N, BLOCK_N, False, GUARD, DESCRIPTORS,
        )  # fmt: skip
    acc, total, peak = forward_span(
        acc, total, peak, queries, keys, values, mask, listed, whole, last, row, q_len, k_len, k_r, v_r,
        mask_r, mask_c, window, scale, softcap, HEAD, HEAD_V, BLOCK_D, BLOCK_V, CAUSAL, WINDOW, SOFTCAP,
        MASK_ROWS, SPARSE_N, BLOCK_N, True, GUARD, DESCRIPTORS,
    )  # fmt: skip
    inverse = tl.where(total > 0.0, 1.0 / total, 0.0)
    acc = acc * inverse[:, None]
    column = tl.arange(0, BLOCK_V)
    place = out + out_at + head * out_h + tl.cast(row, tl.int64)[:, None] * out_r + column[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=(row < q_len)[:, None] & (column < HEAD_V)[None, :])
    if stats is not None:
        stats += stats_at + head * stats_h
        inside = row < q_len
        if mask is not None and mask.dtype.element_ty != tl.uint8:
            # a maximum of -3e38 (a dtype's lowest as mask) would swallow the logarithm
            tl.store(stats + row, tl.where(peak == float("-inf"), float("inf"), peak), mask=inside)
            tl.store(stats + stats_size + row, inverse, mask=inside)
        else:
            seen = (total > 0.0) & (peak > float("-inf"))
            level = tl.where(seen, peak + tl.log2(total), float("inf"))
            tl.store(stats + row, level, mask=inside)
