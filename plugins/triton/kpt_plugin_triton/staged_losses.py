"""Cross entropy on sm_90 by a kernel of its own (kernels/hopper_cross_entropy.py), where that covers a call.

It covers long rows of 16-bit logits whose gradient is wanted, without smoothing and soft cap (of fp16, rows
of up to 106,496 columns); everything else, and every other chip, is left to the portable kernels.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from kpt_plugin_triton import gluon
from kpt_plugin_triton.launch import architecture, ceil_div, processors

#: Columns of a chunk, and chunks that a multiprocessor's shared memory holds.
_CHUNK, _SLOTS = 8192, 14
#: Chunks of the shortest and of the longest row.
_SHORTEST, _LONGEST = 4, 19
_WARPS = 16


class Stages(NamedTuple):
    """Chunks of a row, those that stay in registers, and by how many steps sums lag behind gradients."""

    chunks: int
    held: int
    lag: int


_kernel = functools.partial(gluon.kernel, "hopper_cross_entropy", "cross_entropy_staged")


def stages_of(columns: int, dtype: torch.dtype) -> Stages | None:
    """How a row is kept on a multiprocessor; None for rows that are too short or too long.

    The more chunks are in registers, the more of shared memory is left for the next row, which has to be on
    its way early; where that is not enough, its sums lag.
    """
    chunks = ceil_div(columns, _CHUNK)
    if not _SHORTEST <= chunks <= _LONGEST:
        return None
    held = min(6, max(1, chunks - 12))
    if held > 1 and dtype != torch.bfloat16:  # more of fp16 spills
        return None
    return Stages(chunks, held, 2 if chunks < 12 else 4)


def takes(logits: torch.Tensor, gradient: bool, terms: Any) -> bool:
    """Whether the kernel covers a launch over ``logits`` [rows, columns]."""
    return (
        gradient
        and logits.element_size() == 2
        and terms.smoothing == 0.0
        and terms.softcap is None
        and logits.dim() == 2
        and logits.shape[0] >= 2 * processors(logits.device.index)
        and logits.stride(1) == 1
        and logits.shape[1] % 16 == logits.stride(0) % 16 == 0  # what Triton knows to be whole vectors
        and logits.data_ptr() % 16 == 0
        and stages_of(logits.shape[1], logits.dtype) is not None
        and architecture(logits.device.index) == "sm_90"
        and _kernel() is not None
    )


def programs_for(logits: torch.Tensor) -> int:
    """As many programs as there are multiprocessors, or fewer that have equally many rows."""
    rows = logits.shape[0]
    return ceil_div(rows, ceil_div(rows, processors(logits.device.index)))


def run(
    logits: torch.Tensor,
    target: torch.Tensor,
    common: Any,
    lses: torch.Tensor | None,
    losses: torch.Tensor | None,
    partials: torch.Tensor | None,
    gradient: torch.Tensor,
    most_parts: int,
) -> None:
    """One launch for what `takes` said yes to; the arguments of `loss_rows.rows_forward`."""
    kernel, stages = _kernel(), stages_of(logits.shape[1], logits.dtype)
    assert kernel is not None and stages is not None
    rows, columns = logits.shape
    ignore_index, _, z_loss, _ = common.terms.arguments()
    kernel(
        (programs_for(logits), 1, 1),
        (
            *(logits, target, common.weight, common.denominators, lses, losses, partials, gradient),
            *(rows, columns, logits.stride(0), common.parts, ignore_index, z_loss),
        ),
        (_CHUNK, stages.chunks, stages.held, _SLOTS, stages.lag, most_parts, z_loss != 0.0),
        _WARPS,
    )
