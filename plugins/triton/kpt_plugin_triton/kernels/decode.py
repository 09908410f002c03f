"""Attention of few queries to many keys: keys are split over programs, and a second kernel merges.

The GROUP query heads of a key head and their queries are rows of one tile, so that keys and values are
read once ("flash decoding", Dao et al. 2023).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kpt_plugin_triton.kernels.attention import LOG2E, bounded, in_base_2, load_mask, load_tile


@triton.jit(do_not_specialize=["key_heads", "q_len", "k_len", "splits"])
def decode_split(
    q,
    k,
    v,
    mask,
    lengths,
    part,
    part_peak,
    part_total,
    key_heads,
    q_len,
    k_len,
    each,
    splits,
    q_b,
    q_h,
    q_r,
    k_b,
    k_h,
    k_r,
    v_b,
    v_h,
    v_r,
    mask_b,
    mask_h,
    mask_r,
    mask_c,
    scale,
    softcap,
    HEAD: tl.constexpr,
    HEAD_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program split + splits * (batch x key head): keys ``split * each`` and on.

    Writes ``part`` [splits, batch, heads, q_len, HEAD_V] with its row maxima and sums, in base 2. With
    ``lengths`` [batch], query i sees the keys before ``lengths - q_len + 1 + i``.
    """
    # one dimension: the others of a grid end at 65535
    split = tl.program_id(0) % splits
    pair = tl.program_id(0) // splits
    batch = tl.cast(pair // key_heads, tl.int64)
    key_head = tl.cast(pair % key_heads, tl.int64)
    k_r = tl.cast(k_r, tl.int64)
    v_r = tl.cast(v_r, tl.int64)
    item = tl.arange(0, BLOCK_M)
    row = item % q_len
    head = key_head * GROUP + item // q_len
    real = item < GROUP * q_len
    feature = tl.arange(0, BLOCK_D)
    queries = tl.load(
        q + batch * q_b + (head * q_h + row * tl.cast(q_r, tl.int64))[:, None] + feature[None, :],
        mask=real[:, None] & (feature < HEAD)[None, :],
        other=0.0,
    )
    if lengths is not None:
        k_len = tl.minimum(k_len, tl.load(lengths + batch).to(tl.int32))
    keys = k + batch * k_b + key_head * k_h
    values = v + batch * v_b + key_head * v_h
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    stop = tl.minimum(split * each + each, k_len)
    for start in tl.range(split * each, stop, BLOCK_N):
        key = load_tile(keys, start, k_len, k_r, BLOCK_N, HEAD, BLOCK_D, True, False)
        value = load_tile(values, start, k_len, v_r, BLOCK_N, HEAD_V, BLOCK_V, True, False)
        scores = tl.dot(queries, tl.trans(key), input_precision="ieee") * scale
        if SOFTCAP:
            scores = bounded(scores / LOG2E, softcap, key.dtype == tl.float32) * LOG2E
        column = start + tl.arange(0, BLOCK_N)
        keep = (column < k_len)[None, :]
        if lengths is not None:
            keep = keep & (column[None, :] < (k_len - q_len + 1 + row)[:, None])
        if mask is not None:
            if MASK_ROWS:
                place = (head * mask_h + row * tl.cast(mask_r, tl.int64))[:, None] + (
                    column * tl.cast(mask_c, tl.int64)
                )[None, :]
                given = tl.load(
                    mask + batch * mask_b + place, mask=real[:, None] & (column < k_len)[None, :], other=0
                )
            else:
                given = load_mask(mask + batch * mask_b, row, column, q_len, k_len, mask_r, mask_c, MASK_ROWS)
            if mask.dtype.element_ty == tl.uint8:
                keep = keep & (given != 0)
            else:
                scores += in_base_2(given)
        scores = tl.where(keep, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - level[:, None])
        shrink = tl.exp2(peak - level)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        peak = higher
    all_rows = tl.num_programs(0) // splits * GROUP * q_len
    place = split.to(tl.int64) * all_rows + (batch * key_heads * GROUP + head) * q_len + row
    tl.store(part_peak + place, peak, mask=real)
    tl.store(part_total + place, total, mask=real)
    column_v = tl.arange(0, BLOCK_V)
    tl.store(
        part + place[:, None] * HEAD_V + column_v[None, :],
        acc,
        mask=real[:, None] & (column_v < HEAD_V)[None, :],
    )


@triton.jit(do_not_specialize=["heads", "q_len", "splits", "stats_size"])
def decode_merge(
    part,
    part_peak,
    part_total,
    sinks,
    out,
    stats,
    heads,
    q_len,
    splits,
    out_b,
    out_h,
    out_r,
    stats_size,
    HEAD_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDITIVE: tl.constexpr,
):
    """Program (row of batch x heads x q_len): its parts, weighted by exp2(maximum), over the sum."""
    one = tl.program_id(0)
    all_rows = tl.num_programs(0)
    batch = tl.cast(one // (heads * q_len), tl.int64)
    head = tl.cast(one // q_len % heads, tl.int64)
    column = tl.arange(0, BLOCK_V)
    inside = column < HEAD_V
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, splits, BLOCK):
        split = start + tl.arange(0, BLOCK)
        place = tl.cast(split, tl.int64) * all_rows + one
        peak = tl.maximum(peak, tl.load(part_peak + place, mask=split < splits, other=float("-inf")))
    highest = tl.max(peak, 0)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        highest = tl.maximum(highest, sink)
    level = tl.where(highest == float("-inf"), 0.0, highest)
    sums = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, BLOCK_V], tl.float32)
    for start in range(0, splits, BLOCK):
        split = start + tl.arange(0, BLOCK)
        place = tl.cast(split, tl.int64) * all_rows + one
        known = split < splits
        weight = tl.exp2(tl.load(part_peak + place, mask=known, other=float("-inf")) - level)
        sums += weight * tl.load(part_total + place, mask=known, other=0.0)
        acc += weight[:, None] * tl.load(
            part + place[:, None] * HEAD_V + column[None, :],
            mask=known[:, None] & inside[None, :],
            other=0.0,
        )
    total = tl.sum(sums, 0)
    if sinks is not None:
        total += tl.exp2(sink - level)
    inverse = tl.where(total > 0.0, 1.0 / total, 0.0)
    row = tl.cast(one % q_len, tl.int64)
    place = out + batch * out_b + head * out_h + row * out_r + column
    tl.store(place, (tl.sum(acc, 0) * inverse).to(out.dtype.element_ty), mask=inside)
    if stats is not None:
        if ADDITIVE:
            tl.store(stats + one, tl.where(highest == float("-inf"), float("inf"), highest))
            tl.store(stats + stats_size + one, inverse)
        else:
            tl.store(stats + one, tl.where(total > 0.0, level + tl.log2(total), float("inf")))
