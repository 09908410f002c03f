"""Short attention written out as two products and a softmax, for inductor to fuse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

#: Keys up to which attention runs as two batched products. Beyond, not keeping the scores pays.
LONGEST = 1024
#: Scores (batch x heads x queries x keys) up to which they are kept: 64 MiB in float32.
MOST_SCORES = 1 << 24

_ATTENTION = torch.nn.functional.scaled_dot_product_attention


def attention_as_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` as batched products around a softmax that inductor fuses.

    The flash kernel for CPUs does its products in tiles that are too small for short sequences: there
    whole products are several times as fast in bf16. Scores are kept in float32 from the product on.
    The softmax is spelt out, because inductor recognises one between two products and would put the
    flash kernel back. A row without any key yields zeros, as it does there.
    """
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.matmul(query, key.transpose(-1, -2)).float() * scale
    if is_causal:
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        else:
            scores = scores + attn_mask
    largest = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.matmul((weights / total).to(value.dtype), value)


def _size(value: Any) -> int:
    """A size without a guard on it: the example's, where it is symbolic."""
    if isinstance(value, int):
        return value
    return int(value.node.hint or 1)


def _most(value: Any, ranges: Mapping[Any, ValueRanges]) -> int | None:
    """The largest value of a size whose symbols have ``ranges``; None where nothing bounds it."""
    if isinstance(value, int):
        return value
    expression = value.node.expr
    if not expression.free_symbols <= set(ranges):
        return None
    try:
        return int(bound_sympy(expression, dict(ranges)).upper)
    except (OverflowError, TypeError, ValueError):  # infinite, or an operation without bounds
        return None


def _ranges(graph: torch.fx.GraphModule, bounds: Mapping[int, int]) -> dict[Any, ValueRanges]:
    """Ranges of the symbols that stand for the sizes of inputs, by ``bounds`` on each axis."""
    found: dict[Any, ValueRanges] = {}
    for node in graph.graph.nodes:
        example = node.meta.get("example_value") if node.op == "placeholder" else None
        if not isinstance(example, Tensor):
            continue
        for axis, size in enumerate(example.shape):
            if isinstance(size, torch.SymInt) and axis in bounds and size.node.expr.is_Symbol:
                symbol, most = size.node.expr, bounds[axis]
                if symbol not in found or most < found[symbol].upper:
                    found[symbol] = ValueRanges(0, most)
    return found


def _pays(node: torch.fx.Node, ranges: Mapping[Any, ValueRanges]) -> bool:
    """Whether this attention is short, without dropout, and in a dtype whose products are fast.

    Lengths count by the most that they can be. The batch counts by the example's: like any activation,
    scores grow in proportion to it.
    """
    query, key = (getattr(item, "meta", {}).get("example_value") for item in (*node.args, None, None)[:2])
    if not isinstance(query, Tensor) or not isinstance(key, Tensor) or query.dim() != 4 or key.dim() != 4:
        return False
    dropout = node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)
    if dropout != 0.0 or query.dtype is not torch.bfloat16 or query.device.type != "cpu":
        return False
    queries, keys = _most(query.shape[2], ranges), _most(key.shape[2], ranges)
    if queries is None or keys is None:
        return False
    batch, heads = _size(query.shape[0]), _size(query.shape[1])
    return keys <= LONGEST and batch * heads * queries * keys <= MOST_SCORES


class ShortAttention:
    """A graph pass that exchanges short bf16 attention for `attention_as_products`; counts what it did.

    ``bounds`` are the largest declared sizes of the inputs' dynamic axes, by axis. Attention over keys
    whose number nothing bounds stays as it is.
    """

    def __init__(self, bounds: Mapping[int, int] | None = None) -> None:
        self.bounds = dict(bounds or {})
        self.exchanged = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Any]) -> torch.fx.GraphModule:
        ranges = _ranges(graph, self.bounds)
        for node in graph.graph.nodes:
            if node.op == "call_function" and node.target is _ATTENTION and _pays(node, ranges):
                node.target = attention_as_products
                self.exchanged += 1
        graph.recompile()
        return graph
