"""Attention that skips blocks of queries x keys."""

from __future__ import annotations

import torch

from kpt_plugin_triton.attention import call
from kpt_plugin_triton.attention_checks import check_heads, check_scale, check_window
from kpt_plugin_triton.attention_forward import How
from kpt_plugin_triton.block_lists import block_size
from kpt_plugin_triton.checks import check_same_device, check_tensor, refuse


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
    """`attention` that computes only the blocks that ``block_mask`` keeps.

    ``block_mask`` is (B or 1, H or 1, ceil(S/bm), ceil(L/bn)); True keeps a block. bm and bn are powers of
    two from 16 on, the smallest ones that give these numbers of blocks. Keys of a kept block may still be
    hidden by ``is_causal`` or ``window``; a query without any key gives zeros. Dtypes, gradients and
    errors as for `attention`.

    Raises:
        KernelInputError: an argument's device, dtype, shape or value is not supported.
    """
    name = "attention_block_sparse"
    check_heads(name, q, k, v, 4)
    check_tensor(name, "block_mask", block_mask, (torch.bool,))
    check_same_device(name, "block_mask", block_mask, q)
    if block_mask.dim() != 4:
        refuse(name, "block_mask", f"of {block_mask.dim()} dimensions", "4: (B or 1, H or 1, rows, columns)")
    if block_mask.shape[0] not in (1, q.shape[0]) or block_mask.shape[1] not in (1, q.shape[1]):
        refuse(
            name,
            "block_mask",
            f"of shape {tuple(block_mask.shape)}",
            f"batch 1 or {q.shape[0]} and heads 1 or {q.shape[1]}",
        )
    for axis, length in ((2, q.shape[2]), (3, k.shape[2])):
        if not block_size(length, block_mask.shape[axis]):
            refuse(
                name,
                "block_mask",
                f"of {block_mask.shape[axis]} blocks for {length} positions",
                "as many as blocks of 16, 32, 64, ... positions give",
            )
    check_window(name, window)
    how = How(is_causal, window, check_scale(name, q, scale, softcap, sinks), softcap)
    return call(q, k, v, sinks, how, block_mask=block_mask)
