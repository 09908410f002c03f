"""Lists of kept blocks for block-sparse attention."""

from __future__ import annotations

import torch

from kpt_plugin_triton.attention_forward import Lists
from kpt_plugin_triton.kernels import block_lists as device
from kpt_plugin_triton.launch import Kernel, power_of_two

_list = Kernel(device.list_blocks)


def lists_of(block_mask: torch.Tensor, q_len: int, k_len: int, causal: bool, window: int | None) -> Lists:
    """The kept blocks of ``block_mask`` [B or 1, H or 1, S / bm, L / bn]; sizes of blocks are powers of two.

    Blocks that causality or the window hides are left out; those that it cuts, or that reach beyond the last
    key, come after those that every query of theirs sees in full. Everything stays on the device.
    """
    size_m, size_n = block_size(q_len, block_mask.shape[-2]), block_size(k_len, block_mask.shape[-1])
    batch_step = block_mask.shape[1] if block_mask.shape[0] > 1 else 0
    head_step = 1 if block_mask.shape[1] > 1 else 0
    rows, columns = block_mask.shape[-2:]
    how = q_len, k_len, causal, window
    return Lists(
        *_listed(block_mask, (size_m, size_n), False, *how),
        *_listed(block_mask, (size_m, size_n), True, *how),
        (batch_step * rows, head_step * rows),
        (batch_step * columns, head_step * columns),
        (size_m, size_n),
    )


def _listed(
    mask: torch.Tensor,
    size: tuple[int, int],
    by_key: bool,
    q_len: int,
    k_len: int,
    causal: bool,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(kept, counts) of `Lists`, by query block or by key block."""
    batch, heads, rows, columns = mask.shape
    batch_step, head_step, row_step, column_step = mask.stride()
    if by_key:
        rows, columns, row_step, column_step = columns, rows, column_step, row_step
    lists = batch * heads
    kept = torch.empty((lists, rows, columns), dtype=torch.int32, device=mask.device)
    counts = torch.empty((lists, rows, 2), dtype=torch.int32, device=mask.device)
    if lists and rows:
        _list(
            (rows * lists, 1, 1),
            (
                *(mask.view(torch.uint8), kept, counts, rows, columns, heads),
                *(
                    batch_step,
                    head_step,
                    row_step,
                    column_step,
                    q_len,
                    k_len,
                    min(window or 0, q_len + size[0]),
                ),
            ),
            (
                *(*size, by_key, causal or window is not None, window is not None),
                max(32, min(1024, power_of_two(columns))),
            ),
            4,
        )
    return kept, counts


def block_size(length: int, blocks: int) -> int:
    """The power of two that divides ``length`` into so many blocks; the smallest one, 0 if there is none."""
    if blocks == 0 or length == 0:
        return 16
    size = 16
    while -(-length // size) > blocks:
        size *= 2
    return size if -(-length // size) == blocks else 0
