"""attention over packed sequences, over blocks, and over a cache that is filled in part."""

from __future__ import annotations

import torch

from kpt.ops import reference
from kpt_plugin_triton.block_lists import block_size


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """`attention` within each of the packed sequences, one after the other; (T, H, D) gives (T, H, Dv)."""
    attention = reference("attention")
    parts = []
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for first_q, last_q, first_k, last_k in zip(ends_q, ends_q[1:], ends_k, ends_k[1:]):
        one = (x.transpose(0, 1)[None] for x in (q[first_q:last_q], k[first_k:last_k], v[first_k:last_k]))
        if last_k == first_k:  # a softmax over nothing
            parts.append(q.new_zeros((last_q - first_q, q.shape[1], v.shape[-1])))
            continue
        parts.append(attention(*one, None, is_causal, scale, softcap, sinks, window)[0].transpose(0, 1))
    return torch.cat(parts) if parts else q.new_zeros((0, q.shape[1], v.shape[-1]))


def attention_block_sparse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: torch.Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """`attention` with the mask that ``block_mask`` (B or 1, H or 1, ceil(S/bm), ceil(L/bn)) stands for."""
    rows = block_size(q.shape[2], block_mask.shape[2])
    columns = block_size(k.shape[2], block_mask.shape[3])
    mask = block_mask.repeat_interleave(rows, 2).repeat_interleave(columns, 3)
    mask = mask[:, :, : q.shape[2], : k.shape[2]]
    return reference("attention")(q, k, v, mask, is_causal, scale, softcap, sinks, window)  # type: ignore[no-any-return]


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attention` of the last queries to the first ``lengths`` (B,) keys of a cache, their own included."""
    mask = None
    if lengths is not None:
        column = torch.arange(k.shape[2], device=q.device)
        row = torch.arange(q.shape[2], device=q.device)
        seen = lengths.view(-1, 1, 1) - q.shape[2] + 1 + row[:, None]
        mask = (column < seen)[:, None]
    return reference("attention")(q, k, v, mask, False, scale, softcap, sinks)  # type: ignore[no-any-return]
