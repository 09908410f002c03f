"""Gradients of every form of attention, in a fixed order of summation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kpt_plugin_triton.attention_forward import (
    LISTED,
    LOG2E,
    MASKED,
    WINDOWED,
    Form,
    How,
    described,
    empty_heads,
    fitted,
    kind_of,
    mask_strides,
    section_of,
    stats_strides,
    strides_of,
    tiles,
    window_of,
    with_plain_rows,
)
from kpt_plugin_triton.kernels.attention_backward_keys import attention_backward_keys
from kpt_plugin_triton.kernels.attention_backward_queries import attention_backward_queries
from kpt_plugin_triton.kernels.attention_gradients import attention_delta
from kpt_plugin_triton.launch import Kernel, ceil_div, chip, power_of_two
from kpt_plugin_triton.tuning import Tuned

_delta = Kernel(attention_delta)
_keys = Kernel(attention_backward_keys)
_queries = Kernel(attention_backward_queries)


def _keys_rule(itemsize: int, head: int, kind: int) -> dict[str, int]:
    on = chip()
    hopper = on == 90 and itemsize == 2
    if itemsize == 4:
        found = tiles(16, 32 if head <= 64 else 16, 4, 1)
    elif head > 128:
        found = tiles(16, 32, 8 if on else 4, 1)
    elif hopper and head >= 64:
        found = tiles(32 if kind == MASKED else 64, 128, 8, 2)
    elif head > 64:
        found = tiles(32, 64, 8, 1) if on else tiles(32, 32, 4, 1)
    else:
        found = tiles(32, 64, 4, 1 if on >= 100 else 2)
    if not on and kind == WINDOWED:
        found["num_stages"] = 1  # its bounds are too many scalars beside those of pipelined loads
    return {**found, "SPLIT": 0, "DESCRIPTORS": int(hopper and kind != LISTED)}


def _queries_rule(itemsize: int, head: int, kind: int) -> dict[str, int]:
    on = chip()
    hopper = on == 90 and itemsize == 2
    if itemsize == 4:
        found = tiles(32 if head <= 64 else 16, 16, 4, 1)
    elif head > 128:
        found = tiles(64, 32, 8, 1) if hopper and kind != LISTED else tiles(32, 32, 8 if on else 4, 1)
    elif hopper and head >= 64:
        found = tiles(128, 64, 8, 2)
    else:
        found = tiles(64, 32, 4, 2)
    split = 90 <= on < 100 and head <= 128
    return {**found, "SPLIT": int(split), "DESCRIPTORS": int(hopper and kind != LISTED)}


def _candidates(itemsize: int, head: int, own: tuple[int, ...], own_name: str) -> Iterator[dict[str, int]]:
    """``own`` sizes of the block that a program keeps; the other block is walked over."""
    if itemsize == 4:
        return
    hopper = chip() == 90
    other_name = "BLOCK_M" if own_name == "BLOCK_N" else "BLOCK_N"
    for kept in own:
        for walked in (32, 64, 128):
            for warps in (4, 8):
                accumulators = 2 if own_name == "BLOCK_N" else 1
                if accumulators * kept * head // (32 * warps) > 128 or kept // warps < 8:
                    continue
                if (2 * kept * walked) // (32 * warps) > 128:
                    continue
                for stages in (1, 2, 3):
                    for descriptors in (0, 1) if hopper else (0,):
                        if (2 * kept + 2 * stages * walked) * head * itemsize > 232_448:
                            continue
                        base = {
                            own_name: kept,
                            other_name: walked,
                            "num_warps": warps,
                            "num_stages": stages,
                            "DESCRIPTORS": descriptors,
                        }
                        yield base


def _keys_candidates(itemsize: int, head: int, kind: int) -> Iterator[dict[str, int]]:
    for options in _candidates(itemsize, head, (64, 128), "BLOCK_N"):
        for split in (0, 1) if kind != MASKED else (0,):
            yield {**options, "SPLIT": split}


def _queries_candidates(itemsize: int, head: int, kind: int) -> Iterator[dict[str, int]]:
    for options in _candidates(itemsize, head, (64, 128), "BLOCK_M"):
        yield {**options, "SPLIT": 1}


keys_options = Tuned("attention_backward_keys", ("head", "kind"), _keys_rule, _keys_candidates, reach=1.0)
queries_options = Tuned(
    "attention_backward_queries", ("head", "kind"), _queries_rule, _queries_candidates, reach=1.0
)


def run_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    stats: torch.Tensor,
    form: Form,
    how: How,
    parts: tuple[bool, bool] = (True, True),
    options: Any = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dq, dk, dv, dsinks). ``parts``: whether dq, and whether dk and dv, are wanted (else uninitialised)."""
    dq, dk, dv = empty_heads(q, form.head), empty_heads(k, form.head), empty_heads(v, form.head_v)
    q, k, v, dout = (with_plain_rows(x) for x in (q, k, v, dout))
    if out.numel() == 0 or k.numel() == 0 or form.q_len == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), None if sinks is None else torch.zeros_like(sinks)
    block_d, block_v = max(16, power_of_two(form.head)), max(16, power_of_two(form.head_v))
    all_heads = form.batch * form.heads
    delta = torch.empty(stats.shape[1:], dtype=torch.float32, device=q.device)
    delta_rows = max(1, 2048 // block_v)
    _delta(
        (ceil_div(form.q_len, delta_rows) * all_heads, 1, 1),
        (
            *(out, dout, delta, form.heads, form.q_len, form.starts_q, *strides_of(out), *strides_of(dout)),
            *stats_strides(stats)[:2],
        ),
        (form.head_v, block_v, delta_rows),
        4,
    )
    want_queries, want_keys = parts
    if want_keys:
        _launch_keys(dout, q, k, v, stats, delta, dk, dv, form, how, (block_d, block_v), options)
    if want_queries:
        _launch_queries(dout, q, k, v, stats, delta, dq, form, how, (block_d, block_v), options)
    return dq, dk, dv, None if sinks is None else _sinks_gradient(sinks, stats, delta, form)


def _launch_keys(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    stats: torch.Tensor,
    delta: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    form: Form,
    how: How,
    padded: tuple[int, int],
    options: Any,
) -> None:
    if options is None:
        options = keys_options(q.device.index, q.element_size(), max(padded), kind_of(form, how))
    lists = form.lists
    sparse_m, sparse_n = (0, 0) if lists is None else lists.size
    block_m, block_n = fitted(options["BLOCK_M"], sparse_m), fitted(options["BLOCK_N"], sparse_n)
    blocks = ceil_div(form.k_len, block_n)
    all_heads = form.batch * form.key_heads
    row_bytes = (form.head + form.head_v) * q.element_size()
    group = form.heads // form.key_heads
    _keys(
        (blocks * all_heads, 1, 1),
        (
            *(q, k, v, form.mask, form.starts_q, form.starts_k),
            *((None, None) if lists is None else (lists.kept_by_key, lists.counts_by_key)),
            *(dout, stats, delta, dk, dv, form.key_heads, all_heads, blocks),
            *(section_of(1, group * form.q_len, row_bytes, all_heads), form.q_len, form.k_len),
            *(*strides_of(q), *strides_of(k), *strides_of(v), *strides_of(dout)),
            *(*strides_of(dk), *strides_of(dv), *mask_strides(form.mask), *stats_strides(stats)),
            *((0, 0, 0) if lists is None else (*lists.strides_by_key, lists.kept_by_key.shape[-1])),
            *(window_of(form, how), how.scale * LOG2E, how.softcap or 0.0),
        ),
        _constants(form, how, padded, (sparse_m, sparse_n, block_m, block_n), options, q, k, v, dout),
        options["num_warps"],
        options["num_stages"],
    )


def _launch_queries(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    stats: torch.Tensor,
    delta: torch.Tensor,
    dq: torch.Tensor,
    form: Form,
    how: How,
    padded: tuple[int, int],
    options: Any,
) -> None:
    if options is None:
        options = queries_options(q.device.index, q.element_size(), max(padded), kind_of(form, how))
    lists = form.lists
    sparse_m, sparse_n = (0, 0) if lists is None else lists.size
    block_m, block_n = fitted(options["BLOCK_M"], sparse_m), fitted(options["BLOCK_N"], sparse_n)
    blocks = ceil_div(form.q_len, block_m)
    all_heads = form.batch * form.heads
    row_bytes = (form.head + form.head_v) * q.element_size()
    group = form.heads // form.key_heads
    _queries(
        (blocks * all_heads, 1, 1),
        (
            *(q, k, v, form.mask, form.starts_q, form.starts_k),
            *((None, None) if lists is None else (lists.kept, lists.counts)),
            *(dout, stats, delta, dq, form.heads, all_heads, blocks),
            *(section_of(group, form.k_len, row_bytes, all_heads), form.q_len, form.k_len),
            *(*strides_of(q), *strides_of(k), *strides_of(v), *strides_of(dout)),
            *(*strides_of(dq), *mask_strides(form.mask), *stats_strides(stats)),
            *((0, 0, 0) if lists is None else (*lists.strides, lists.kept.shape[-1])),
            *(window_of(form, how), how.scale * LOG2E, how.softcap or 0.0),
        ),
        _constants(form, how, padded, (sparse_m, sparse_n, block_m, block_n), options, q, k, v, dout),
        options["num_warps"],
        options["num_stages"],
    )


def _constants(
    form: Form,
    how: How,
    padded: tuple[int, int],
    blocks: tuple[int, int, int, int],
    options: Any,
    *read: torch.Tensor,
) -> tuple[Any, ...]:
    """The compile-time constants of both kernels; ``read`` is what descriptors would be for."""
    return (
        *(form.head, form.head_v, *padded, form.heads // form.key_heads),
        *(how.causal or how.window is not None, how.window is not None, how.softcap is not None),
        *(form.mask is not None and form.mask.stride(2) != 0, *blocks),
        bool(options["SPLIT"]),
        described(options, *read),
    )


def _sinks_gradient(
    sinks: torch.Tensor, stats: torch.Tensor, delta: torch.Tensor, form: Form
) -> torch.Tensor:
    """A sink's probability has no value behind it: its score's gradient is -probability * delta."""
    shape = (-1, 1) if form.packed else (1, -1, 1)
    exponents = sinks.float().mul(LOG2E).view(shape) - stats[0]
    weights = torch.exp2(exponents) * stats[1] if form.additive else torch.exp2(exponents)
    return (weights * delta).sum(-1 if form.packed else (0, 2)).neg().to(sinks.dtype)
