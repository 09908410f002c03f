"""Attention written out as two products and a softmax, for the compiler to fuse."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def written_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`F.scaled_dot_product_attention` of [B, H, S, D] tensors; scores and softmax in fp32.

    A row of which every key is masked gives zeros, as the fused kernel does.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = torch.matmul(query, key.transpose(-1, -2)).float() * scale
    if is_causal:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~causal, float("-inf"))
    masked = is_causal
    if attn_mask is not None:
        masked = True
        if attn_mask.dtype is torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        else:
            scores = scores + attn_mask
    top = scores.amax(-1, keepdim=True)
    if masked:
        top = torch.where(top == float("-inf"), 0.0, top)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if masked:
        total = torch.where(total == 0.0, 1.0, total)
    return torch.matmul((weights / total).to(value.dtype), value)


def write_out_attention(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> torch.fx.GraphModule:
    """Replace every call of the fused attention without dropout in a captured graph."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target is F.scaled_dot_product_attention:
            rate = node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)
            if rate == 0.0:
                node.target = written_out
    graph.recompile()
    return graph
