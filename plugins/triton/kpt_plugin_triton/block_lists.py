"""Lists of kept blocks for block-sparse attention."""

from __future__ import annotations

import torch

from kpt_plugin_triton.attention_forward import Lists


def lists_of(block_mask: torch.Tensor, q_len: int, k_len: int, causal: bool, window: int | None) -> Lists:
    """The kept blocks of ``block_mask`` [B or 1, H or 1, S / bm, L / bn]; sizes of blocks are powers of two.

    Blocks that causality or the window hides are left out; those that it cuts, or that reach beyond the last
    key, come after those that every query of theirs sees in full. Everything stays on the device.
    """
    size_m, size_n = block_size(q_len, block_mask.shape[-2]), block_size(k_len, block_mask.shape[-1])
    device = block_mask.device
    top = torch.arange(block_mask.shape[-2], device=device)[:, None] * size_m
    left = torch.arange(block_mask.shape[-1], device=device)[None, :] * size_n
    bottom, right = top + size_m - 1, left + size_n - 1
    some = (top < q_len) & (left < k_len)
    whole = right < k_len
    if causal or window is not None:
        some, whole = some & (left <= bottom.clamp(max=q_len - 1)), whole & (right <= top)
    if window is not None:
        some, whole = some & (right > top - window), whole & (left > bottom - window)
    kept = block_mask & some
    # 2: seen in full, 1: cut, 0: left out; a stable sort keeps neighbours together
    rank = kept.to(torch.int8) + (kept & whole).to(torch.int8)
    batch_step = block_mask.shape[1] if block_mask.shape[0] > 1 else 0
    head_step = 1 if block_mask.shape[1] > 1 else 0
    rows, columns = block_mask.shape[-2:]
    return Lists(
        *_listed(rank),
        *_listed(rank.transpose(-1, -2)),
        (batch_step * rows, head_step * rows),
        (batch_step * columns, head_step * columns),
        (size_m, size_n),
    )


def _listed(rank: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.argsort(rank, dim=-1, descending=True, stable=True)
    counts = torch.stack(((rank == 2).sum(-1), (rank > 0).sum(-1)), dim=-1)
    return order.to(torch.int32).contiguous(), counts.to(torch.int32).contiguous()


def block_size(length: int, blocks: int) -> int:
    """The power of two that divides ``length`` into so many blocks; the smallest one, 0 if there is none."""
    if blocks == 0 or length == 0:
        return 16
    size = 16
    while -(-length // size) > blocks:
        size *= 2
    return size if -(-length // size) == blocks else 0
