"""Attention forward on sm_90 by a kernel of its own (kernels/hopper_attention.py), where that covers a call.

It covers dense calls of 16-bit tensors with 64 or 128 features a head, causal or not, with grouped keys;
everything else, and every other chip, is left to the portable kernel.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from kpt_plugin_triton import gluon
from kpt_plugin_triton.launch import architecture, ceil_div, processors

#: Queries of a tile, keys of a block, and blocks of keys that are under way.
_QUERIES, _KEYS, _STAGES = 128, 128, 2
#: Tiles beyond which the order is not looked for: it takes the host longer, and matters less.
_MOST_TILES = 100_000
#: What a tile costs besides its blocks of keys, in blocks.
_OVERHEAD = 1.5
_LOG2E = 1.4426950408889634


_kernel = functools.partial(gluon.kernel, "hopper_attention", "attention_forward_hopper")


def takes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, form: Any, how: Any
) -> bool:
    """Whether the kernel covers a call whose tensors can be read through descriptors."""
    return (
        form.head == form.head_v
        and form.head in (64, 128)
        and q.element_size() == 2
        and not form.packed
        and form.mask is None
        and form.lists is None
        and sinks is None
        and how.window is None
        and how.softcap is None
        and form.q_len >= _QUERIES
        and min(*q.stride(), *k.stride(), *v.stride()) > 0
        and architecture(q.device.index) == "sm_90"
        and _kernel() is not None
    )


@functools.lru_cache(maxsize=4096)
def order_of(blocks: int, heads: int, section: int, programs: int, causal: bool) -> tuple[int, int]:
    """(heads side by side, whether every other turn is backwards) of the order that spreads work best.

    ``section`` heads at most are side by side. Programs take tiles in turns, so that the one with the most
    blocks of keys is what a call waits for.
    """
    if not causal or blocks * heads > _MOST_TILES:
        return section, 0
    tile = torch.arange(ceil_div(blocks * heads, programs) * programs, device="cpu")
    found = (float("inf"), section, 0)
    for each in sorted({max(1, section * part // 8) for part in range(4, 13)} | {section}, reverse=True):
        each = min(each, heads)
        inside = tile % (each * blocks)
        width = (heads - tile // (each * blocks) * each).clamp(1, each)
        cost = torch.where(tile < blocks * heads, blocks - inside // width + _OVERHEAD, 0.0)
        turns = cost.view(-1, programs)
        turned = turns.clone()
        turned[1::2] = turns[1::2].flip(1)
        for snake, costs in ((0, turns), (1, turned)):
            found = min(found, (round(float(costs.sum(0).max()), 3), each, snake), key=lambda one: one[0])
    return found[1], found[2]


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor | None,
    form: Any,
    how: Any,
    section: int,
) -> None:
    """Write ``out``, and ``stats`` if it is given, for a call that `takes` said yes to."""
    kernel = _kernel()
    assert kernel is not None
    blocks = ceil_div(form.q_len, _QUERIES)
    all_heads = form.batch * form.heads
    programs = min(processors(q.device.index), blocks * all_heads)
    section, snake = order_of(blocks, all_heads, section, programs, how.causal)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3])
    stats_strides = (0, 0) if stats is None else (form.heads * form.q_len, form.q_len)
    kernel(
        (programs, 1, 1),
        (
            *(q, k, v, out, stats, form.batch, form.heads, form.key_heads, all_heads, blocks, section, snake),
            *(form.q_len, form.k_len, *strides, *stats_strides, how.scale * _LOG2E),
        ),
        (form.head, form.heads // form.key_heads, how.causal, _KEYS, _STAGES),
        4,
    )
