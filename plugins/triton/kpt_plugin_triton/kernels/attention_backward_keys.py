"""Attention backward for the gradients of keys and values: a program keeps its keys, without atomics."""

from __future__ import annotations

import triton
import triton.language as tl

from kpt_plugin_triton.kernels.attention import (
    LOG2E,
    in_base_2,
    load_mask,
    load_tile,
    place_in_section,
)
from kpt_plugin_triton.kernels.attention_gradients import gradient_of_scores


@triton.jit
def query_span(
    dkey,
    dvalue,
    key,
    value,
    queries,
    douts,
    stats,
    deltas,
    mask,
    listed,
    first,
    last,
    column,
    q_len,
    k_len,
    q_r,
    dout_r,
    mask_r,
    mask_c,
    stats_size,
    q_h,
    dout_h,
    stats_h,
    mask_h,
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
    SPARSE_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MEMBERS: tl.constexpr,
    MASKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Add what query blocks ``first`` to ``last`` give to dk and dv of one block of keys."""
    ADDITIVE: tl.constexpr = mask is not None and mask.dtype.element_ty != tl.uint8
    # What rows of the scores' transpose lose is put into the accumulators first: registers are scarce here.
    FOLDED: tl.constexpr = not SOFTCAP and not ADDITIVE
    HIDES: tl.constexpr = MASKED and (CAUSAL or (mask is not None and not ADDITIVE))
    unscale = 1.0 / scale
    count = last - first
    for step in range(count * MEMBERS):
        if MEMBERS > 1:
            each = tl.maximum(count, 1)
            number = first + step % each
            member = step // each
        else:
            number = first + step
            member = 0
        if SPARSE_M > 0:
            EACH: tl.constexpr = SPARSE_M // BLOCK_M
            start = tl.load(listed + number // EACH) * SPARSE_M + number % EACH * BLOCK_M
        else:
            start = number * BLOCK_M
        row = start + tl.arange(0, BLOCK_M)
        wide = tl.cast(member, tl.int64)
        # rows beyond the last have +inf as statistic, hence probability 0: they need no mask
        level = tl.load(stats + wide * stats_h + row, mask=row < q_len, other=float("inf"))
        delta = tl.load(deltas + wide * stats_h + row, mask=row < q_len, other=0.0)
        if DESCRIPTORS:
            query = queries.load([member, start, 0]).reshape(BLOCK_M, BLOCK_D)
            dout = douts.load([member, start, 0]).reshape(BLOCK_M, BLOCK_V)
        else:
            query = load_tile(queries + wide * q_h, start, q_len, q_r, BLOCK_M, HEAD, BLOCK_D, True, False)
            dout = load_tile(
                douts + wide * dout_h, start, q_len, dout_r, BLOCK_M, HEAD_V, BLOCK_V, True, False
            )
        nothing = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        if FOLDED:
            raw = nothing - (level * unscale)[None, :]
            raw = tl.dot(key, tl.trans(query), raw, input_precision="ieee")
            lost = 0.0
        else:
            raw = tl.dot(key, tl.trans(query), input_precision="ieee")
            lost = level[None, :]
        dweights = nothing - delta[None, :]
        dweights = tl.dot(value, tl.trans(dout), dweights, input_precision="ieee")
        given = 0.0
        keep = True
        inverse = level
        if MASKED:
            # columns beyond the last key are never stored, whatever they come to
            if WINDOW:
                gap = row[None, :] - column[:, None]
                keep = gap.to(tl.uint32) < tl.cast(window, tl.uint32)
            elif CAUSAL:
                keep = column[:, None] <= row[None, :]
            if mask is not None:
                loaded = tl.trans(
                    load_mask(mask + wide * mask_h, row, column, q_len, k_len, mask_r, mask_c, MASK_ROWS)
                )
                if ADDITIVE:
                    given = in_base_2(loaded)
                    inverse = tl.load(stats + stats_size + wide * stats_h + row, mask=row < q_len, other=0.0)
                elif CAUSAL:
                    keep = keep & (loaded != 0)
                else:
                    keep = loaded != 0
        weights, gradient = gradient_of_scores(
            raw, dweights, lost, inverse[None, :], given, keep, scale, softcap,
            SOFTCAP, ADDITIVE, HIDES, key.dtype == tl.float32,
        )  # fmt: skip
        dvalue = tl.dot(weights.to(dout.dtype), dout, dvalue, input_precision="ieee")
        dkey = tl.dot(gradient.to(query.dtype), query, dkey, input_precision="ieee")
    return dkey, dvalue


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
def attention_backward_keys(
    q,
    k,
    v,
    mask,
    starts_q,
    starts_k,
    lists,
    counts,
    dout,
    stats,
    delta,
    dk,
    dv,
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
    dout_b,
    dout_h,
    dout_r,
    dk_b,
    dk_h,
    dk_r,
    dv_b,
    dv_h,
    dv_r,
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
    """dk and dv of BLOCK_N keys of one key head: sums over its GROUP query heads and their queries.

    ``heads`` and ``all_heads`` count key heads; the lists are those of query blocks by key block.
    Without SPLIT one loop masks every block: fewer registers than three loops need.
    """
    block, both = place_in_section(tl.program_id(0), blocks, all_heads, section)
    batch = tl.cast(both // heads, tl.int64)
    key_head = tl.cast(both % heads, tl.int64)
    q_r = tl.cast(q_r, tl.int64)
    k_r = tl.cast(k_r, tl.int64)
    v_r = tl.cast(v_r, tl.int64)
    dout_r = tl.cast(dout_r, tl.int64)
    q_at = batch * q_b
    k_at = batch * k_b
    v_at = batch * v_b
    dout_at = batch * dout_b
    dk_at = batch * dk_b
    dv_at = batch * dv_b
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
        dout_at = tl.where(q_len > 0, q_start, 0) * dout_r
        dk_at = k_start * dk_r
        dv_at = k_start * dv_r
        stats_at = q_start
    start = block * BLOCK_N
    column = start + tl.arange(0, BLOCK_N)
    if DESCRIPTORS:
        # A descriptor of no rows is an illegal instruction: an empty sequence describes the tensor's
        # first row, which nothing of it looks at.
        q_rows = tl.maximum(q_len, 1)
        k_rows = tl.maximum(k_len, 1)
        keys = tl.make_tensor_descriptor(
            k + k_at + key_head * k_h, [k_rows, HEAD], [k_r, 1], [BLOCK_N, BLOCK_D]
        )
        values = tl.make_tensor_descriptor(
            v + v_at + key_head * v_h, [k_rows, HEAD_V], [v_r, 1], [BLOCK_N, BLOCK_V]
        )
    else:
        keys = k + k_at + key_head * k_h
        values = v + v_at + key_head * v_h
    key = load_tile(keys, start, k_len, k_r, BLOCK_N, HEAD, BLOCK_D, True, DESCRIPTORS)
    value = load_tile(values, start, k_len, v_r, BLOCK_N, HEAD_V, BLOCK_V, True, DESCRIPTORS)
    dkey = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dvalue = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    # query blocks: masked [first, inner), whole [inner, whole), masked [whole, last)
    first = 0
    inner = 0
    last = tl.cdiv(q_len, BLOCK_M)
    if CAUSAL:
        first = tl.minimum(start // BLOCK_M, last)
        inner = tl.minimum(tl.cdiv(start + BLOCK_N - 1, BLOCK_M), last)
    whole = last + 0
    if WINDOW:
        last = tl.minimum(last, tl.cdiv(start + BLOCK_N - 1 + window, BLOCK_M))
        inner = tl.minimum(inner, last)
        whole = tl.minimum(tl.maximum((start + window) // BLOCK_M, inner), last)
    last = tl.where(start < k_len, last, first)
    whole = tl.minimum(whole, last)
    inner = tl.minimum(inner, whole)
    # Lists differ from head to head; otherwise the group's heads are one longer loop.
    MEMBERS: tl.constexpr = 1 if SPARSE_M > 0 else GROUP
    for turn in range(GROUP // MEMBERS):
        head = key_head * GROUP + turn
        queries = q + q_at + head * q_h
        douts = dout + dout_at + head * dout_h
        if DESCRIPTORS:
            query_tiles = tl.make_tensor_descriptor(
                queries, [MEMBERS, q_rows, HEAD], [q_h, q_r, 1], [1, BLOCK_M, BLOCK_D]
            )
            dout_tiles = tl.make_tensor_descriptor(
                douts, [MEMBERS, q_rows, HEAD_V], [dout_h, dout_r, 1], [1, BLOCK_M, BLOCK_V]
            )
        else:
            query_tiles = queries
            dout_tiles = douts
        level = stats + stats_at + head * stats_h
        deltas = delta + stats_at + head * stats_h
        masks = mask
        listed = lists
        outset, begin, middle, end = first, inner, whole, last
        if mask is not None:
            masks = mask + batch * mask_b + head * mask_h
        if SPARSE_M > 0:
            one = batch * lists_b + head * lists_h + start // SPARSE_N
            listed = lists + one * lists_width
            outset = 0
            begin = 0
            middle = tl.load(counts + 2 * one) * (SPARSE_M // BLOCK_M)
            end = tl.load(counts + 2 * one + 1) * (SPARSE_M // BLOCK_M)
        if mask is not None or not SPLIT:
            dkey, dvalue = query_span(
                dkey, dvalue, key, value, query_tiles, dout_tiles, level, deltas, masks, listed, outset,
                end, column, q_len, k_len, q_r, dout_r, mask_r, mask_c, stats_size, q_h, dout_h, stats_h,
                mask_h, window, scale, softcap, HEAD, HEAD_V, BLOCK_D, BLOCK_V, CAUSAL, WINDOW, SOFTCAP,
                MASK_ROWS, SPARSE_M, BLOCK_M, BLOCK_N, MEMBERS, True, DESCRIPTORS,
            )  # fmt: skip
        else:
            if CAUSAL and SPARSE_M == 0:
                dkey, dvalue = query_span(
                    dkey, dvalue, key, value, query_tiles, dout_tiles, level, deltas, masks, listed,
                    outset, begin, column, q_len, k_len, q_r, dout_r, mask_r, mask_c, stats_size, q_h,
                    dout_h, stats_h, mask_h, window, scale, softcap, HEAD, HEAD_V, BLOCK_D, BLOCK_V,
                    CAUSAL, WINDOW, SOFTCAP, MASK_ROWS, SPARSE_M, BLOCK_M, BLOCK_N, MEMBERS, True,
                    DESCRIPTORS,
                )  # fmt: skip
            dkey, dvalue = query_span(
                dkey, dvalue, key, value, query_tiles, dout_tiles, level, deltas, masks, listed, begin,
                middle, column, q_len, k_len, q_r, dout_r, mask_r, mask_c, stats_size, q_h, dout_h,
                stats_h, mask_h, window, scale, softcap, HEAD, HEAD_V, BLOCK_D, BLOCK_V, CAUSAL, WINDOW,
                SOFTCAP, MASK_ROWS, SPARSE_M, BLOCK_M, BLOCK_N, MEMBERS, False, DESCRIPTORS,
            )  # fmt: skip
            if WINDOW or SPARSE_M > 0:
                dkey, dvalue = query_span(
                    dkey, dvalue, key, value, query_tiles, dout_tiles, level, deltas, masks, listed,
                    middle, end, column, q_len, k_len, q_r, dout_r, mask_r, mask_c, stats_size, q_h,
                    dout_h, stats_h, mask_h, window, scale, softcap, HEAD, HEAD_V, BLOCK_D, BLOCK_V,
                    CAUSAL, WINDOW, SOFTCAP, MASK_ROWS, SPARSE_M, BLOCK_M, BLOCK_N, MEMBERS, True,
                    DESCRIPTORS,
                )  # fmt: skip
    wide = tl.cast(column, tl.int64)[:, None]
    feature = tl.arange(0, BLOCK_D)[None, :]
    place = dk + dk_at + key_head * dk_h + wide * dk_r + feature
    dkey *= scale / LOG2E
    tl.store(place, dkey.to(dk.dtype.element_ty), mask=(column < k_len)[:, None] & (feature < HEAD))
    feature_v = tl.arange(0, BLOCK_V)[None, :]
    place_v = dv + dv_at + key_head * dv_h + wide * dv_r + feature_v
    tl.store(place_v, dvalue.to(dv.dtype.element_ty), mask=(column < k_len)[:, None] & (feature_v < HEAD_V))
