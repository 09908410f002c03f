"""The kept blocks of a block mask as lists, in one launch for each direction."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _ranked(
    mask,
    row,
    column,
    columns,
    mask_r,
    mask_c,
    q_len,
    k_len,
    window,
    SIZE_M: tl.constexpr,
    SIZE_N: tl.constexpr,
    BY_KEY: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """(whether every query of a block sees all of its keys, whether only some pairs are seen)."""
    if BY_KEY:
        top = column * SIZE_M
        left = row * SIZE_N + tl.zeros_like(column)
    else:
        top = row * SIZE_M + tl.zeros_like(column)
        left = column * SIZE_N
    bottom = top + (SIZE_M - 1)
    right = left + (SIZE_N - 1)
    some = (column < columns) & (top < q_len) & (left < k_len)
    whole = right < k_len
    if CAUSAL:
        some = some & (left <= tl.minimum(bottom, q_len - 1))
        whole = whole & (right <= top)
    if WINDOW:
        some = some & (right > top - window)
        whole = whole & (left > bottom - window)
    kept = tl.load(mask + row.to(tl.int64) * mask_r + column.to(tl.int64) * mask_c, mask=some, other=0) != 0
    return (kept & whole).to(tl.int32), (kept & (whole == 0)).to(tl.int32)


@triton.jit(do_not_specialize=["rows", "columns", "heads", "q_len", "k_len", "window"])
def list_blocks(
    mask,
    kept,
    counts,
    rows,
    columns,
    heads,
    mask_b,
    mask_h,
    mask_r,
    mask_c,
    q_len,
    k_len,
    window,
    SIZE_M: tl.constexpr,
    SIZE_N: tl.constexpr,
    BY_KEY: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of one list: first the blocks that are seen in full, then those that are cut, in their order.

    ``kept`` [lists, rows, columns]; ``counts`` [lists, rows, 2] receives how many are seen in full, and how
    many in all. What is behind those in ``kept`` stays unwritten.
    """
    # one dimension: the others of a grid end at 65535
    row = tl.program_id(0) % rows
    one = tl.program_id(0) // rows
    mask += (one // heads).to(tl.int64) * mask_b + (one % heads).to(tl.int64) * mask_h
    place = one.to(tl.int64) * rows + row
    within = tl.arange(0, BLOCK)
    full = tl.zeros([], tl.int32)
    for start in range(0, columns, BLOCK):
        whole, _ = _ranked(
            mask, row, start + within, columns, mask_r, mask_c, q_len, k_len, window, SIZE_M, SIZE_N, BY_KEY,
            CAUSAL, WINDOW,
        )  # fmt: skip
        full += tl.sum(whole, axis=0)
    before = tl.zeros([], tl.int32)
    cut_before = full
    for start in range(0, columns, BLOCK):
        column = start + within
        whole, cut = _ranked(
            mask, row, column, columns, mask_r, mask_c, q_len, k_len, window, SIZE_M, SIZE_N, BY_KEY,
            CAUSAL, WINDOW,
        )  # fmt: skip
        first = before + tl.cumsum(whole, axis=0) - 1
        second = cut_before + tl.cumsum(cut, axis=0) - 1
        target = kept + place * columns + tl.where(whole != 0, first, second)
        tl.store(target, column, mask=(whole | cut) != 0)
        before += tl.sum(whole, axis=0)
        cut_before += tl.sum(cut, axis=0)
    tl.store(counts + 2 * place, full)
    tl.store(counts + 2 * place + 1, cut_before)
