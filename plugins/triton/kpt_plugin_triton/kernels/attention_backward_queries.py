"""Attention backward for the gradient of queries: a program keeps its queries, without atomics."""

from __future__ import annotations

import triton
import triton.language as tl

from kpt_plugin_triton.kernels.attention import (
    LOG2E,
    in_base_2,
    key_spans,
    load_mask,
    load_tile,
    place_in_section,
    visible,
)
from kpt_plugin_triton.kernels.attention_gradients import gradient_of_scores


@triton.jit
def key_span(
    dquery,
    query,
    dout,
    keys,
    values,
    level,
    inverse,
    delta,
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
    DESCRIPTORS: tl.constexpr,
):
    """Add what key blocks ``first`` to ``last`` give to dq of one block of queries."""
    ADDITIVE: tl.constexpr = mask is not None and mask.dtype.element_ty != tl.uint8
    for number in range(first, last):
        if SPARSE_N > 0:
            EACH: tl.constexpr = SPARSE_N // BLOCK_N
            start = tl.load(listed + number // EACH) * SPARSE_N + number % EACH * BLOCK_N
        else:
            start = number * BLOCK_N
        key = load_tile(keys, start, k_len, k_r, BLOCK_N, HEAD, BLOCK_D, MASKED, DESCRIPTORS)
        value = load_tile(values, start, k_len, v_r, BLOCK_N, HEAD_V, BLOCK_V, MASKED, DESCRIPTORS)
        raw = tl.dot(query, tl.trans(key), input_precision="ieee")
        dweights = tl.dot(dout, tl.trans(value), input_precision="ieee")
        given = 0.0
        keep = True
        if MASKED:
            column = start + tl.arange(0, BLOCK_N)
            keep = visible(row[:, None], column[None, :], k_len, window, CAUSAL, WINDOW)
            if mask is not None:
                loaded = load_mask(mask, row, column, q_len, k_len, mask_r, mask_c, MASK_ROWS)
                if ADDITIVE:
                    given = in_base_2(loaded)
                else:
                    keep = keep & (loaded != 0)
        _, gradient = gradient_of_scores(
            raw, dweights - delta[:, None], level[:, None], inverse[:, None], given, keep, scale, softcap,
            SOFTCAP, ADDITIVE, MASKED, key.dtype == tl.float32,
        )  # fmt: skip
        dquery = tl.dot(gradient.to(key.dtype), key, dquery, input_precision="ieee")
    return dquery


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
def attention_backward_queries(
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
    dq,
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
    dq_b,
    dq_h,
    dq_r,
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
    """dq of BLOCK_M queries of one head; lists and the order of programs as in the forward kernel."""
    block, both = place_in_section(tl.program_id(0), blocks, all_heads, section)
    if CAUSAL:
        block = blocks - 1 - block
    batch = tl.cast(both // heads, tl.int64)
    head = tl.cast(both % heads, tl.int64)
    q_r = tl.cast(q_r, tl.int64)
    k_r = tl.cast(k_r, tl.int64)
    v_r = tl.cast(v_r, tl.int64)
    dout_r = tl.cast(dout_r, tl.int64)
    q_at = batch * q_b
    k_at = batch * k_b
    v_at = batch * v_b
    dout_at = batch * dout_b
    dq_at = batch * dq_b
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
        dq_at = q_start * dq_r
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
        queries = tl.make_tensor_descriptor(
            q + q_at + head * q_h, [q_rows, HEAD], [q_r, 1], [BLOCK_M, BLOCK_D]
        )
        douts = tl.make_tensor_descriptor(
            dout + dout_at + head * dout_h, [q_rows, HEAD_V], [dout_r, 1], [BLOCK_M, BLOCK_V]
        )
        keys = tl.make_tensor_descriptor(k + k_at, [k_rows, HEAD], [k_r, 1], [BLOCK_N, BLOCK_D])
        values = tl.make_tensor_descriptor(v + v_at, [k_rows, HEAD_V], [v_r, 1], [BLOCK_N, BLOCK_V])
    else:
        queries = q + q_at + head * q_h
        douts = dout + dout_at + head * dout_h
        keys = k + k_at
        values = v + v_at
    query = load_tile(queries, start, q_len, q_r, BLOCK_M, HEAD, BLOCK_D, True, DESCRIPTORS)
    grad = load_tile(douts, start, q_len, dout_r, BLOCK_M, HEAD_V, BLOCK_V, True, DESCRIPTORS)
    stats += stats_at + head * stats_h
    level = tl.load(stats + row, mask=row < q_len, other=float("inf"))
    inner_delta = tl.load(delta + stats_at + head * stats_h + row, mask=row < q_len, other=0.0)
    inverse = level
    if mask is not None:
        mask += batch * mask_b + head * mask_h
        if mask.dtype.element_ty != tl.uint8:
            inverse = tl.load(stats + stats_size + row, mask=row < q_len, other=0.0)
    dquery = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    listed = lists
    if SPARSE_N > 0:
        one = batch * lists_b + head * lists_h + start // SPARSE_M
        listed += one * lists_width
        first = 0
        inner = 0
        whole = tl.load(counts + 2 * one) * (SPARSE_N // BLOCK_N)
        last = tl.load(counts + 2 * one + 1) * (SPARSE_N // BLOCK_N)
        if not SPLIT:
            whole = first
    else:
        first, inner, whole, last = key_spans(
            start, q_len, k_len, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, mask is not None or not SPLIT
        )
    if WINDOW and SPARSE_N == 0 and SPLIT:
        dquery = key_span(
            dquery, query, grad, keys, values, level, inverse, inner_delta, mask, listed, first, inner, row,
            q_len, k_len, k_r, v_r, mask_r, mask_c, window, scale, softcap, HEAD, HEAD_V, BLOCK_D, BLOCK_V,
            CAUSAL, WINDOW, SOFTCAP, MASK_ROWS, SPARSE_N, BLOCK_N, True, DESCRIPTORS,
        )  # fmt: skip
    if mask is None and SPLIT:
        dquery = key_span(
            dquery, query, grad, keys, values, level, inverse, inner_delta, mask, listed, inner, whole, row,
            q_len, k_len, k_r, v_r, mask_r, mask_c, window, scale, softcap, HEAD, HEAD_V, BLOCK_D, BLOCK_V,
            CAUSAL, WINDOW, SOFTCAP, MASK_ROWS, SPARSE_N, BLOCK_N, False, DESCRIPTORS,
        )  # fmt: skip
    dquery = key_span(
        dquery, query, grad, keys, values, level, inverse, inner_delta, mask, listed, whole, last, row,
        q_len, k_len, k_r, v_r, mask_r, mask_c, window, scale, softcap, HEAD, HEAD_V, BLOCK_D, BLOCK_V,
        CAUSAL, WINDOW, SOFTCAP, MASK_ROWS, SPARSE_N, BLOCK_N, True, DESCRIPTORS,
    )  # fmt: skip
    dquery *= scale / LOG2E
    feature = tl.arange(0, BLOCK_D)[None, :]
    place = dq + dq_at + head * dq_h + tl.cast(row, tl.int64)[:, None] * dq_r + feature
    tl.store(place, dquery.to(dq.dtype.element_ty), mask=(row < q_len)[:, None] & (feature < HEAD))
