"""softmax on sm_90 by kernels of its own (kernels/hopper_softmax.py), where these cover a call.

They cover rows of more than 16,384 columns of bf16 or fp16, up to 106,496 forward and 73,728 backward; all
else, and every other chip, is left to the portable kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kpt_plugin_triton import gluon
from kpt_plugin_triton.launch import architecture, ceil_div, processors

#: Columns beyond which a row is kept on a multiprocessor, and up to which it shares one with another program.
_SHORTEST, _SHARED = 16384, 49152


class Stages(NamedTuple):
    """Columns of a chunk, chunks of a row, in registers and in the ring, warps, programs a multiprocessor."""

    block: int
    chunks: int
    held: int
    slots: int
    warps: int
    programs: int


_forward = functools.partial(gluon.kernel, "hopper_softmax", "softmax_staged")
_backward = functools.partial(gluon.kernel, "hopper_softmax", "softmax_gradient_staged")


def forward_stages(columns: int) -> Stages | None:
    """How a row is kept on a multiprocessor; None for rows that are too short or too long."""
    if columns <= _SHORTEST or columns > 13 * 8192:
        return None
    if columns <= _SHARED:
        return Stages(4096, ceil_div(columns, 4096), 1, 13, 8, 2)
    return Stages(8192, ceil_div(columns, 8192), 1, 14, 16, 1)


def backward_stages(columns: int) -> Stages | None:
    """The same for a row of y and one of its gradient."""
    chunks = ceil_div(columns, 8192)
    if columns <= _SHORTEST or chunks > 9:
        return None
    return Stages(8192, chunks, min(3, max(1, chunks - 5)), 7, 16, 1)


def forward(x: torch.Tensor, y: torch.Tensor, rows: int, stride: int) -> bool:
    """Launch over ``x``, rows ``stride`` apart, into a contiguous ``y``; False where that is not covered."""
    columns = x.shape[-1]
    stages = forward_stages(columns)
    if stages is None or not _fits((x,), rows, columns, stride):
        return False
    _run(_forward, (x, y, rows, columns, stride), stages, rows)
    return True


def backward(
    y: torch.Tensor, dy: torch.Tensor, dx: torch.Tensor, rows: int, stride: int, grad_stride: int
) -> bool:
    """The same for the gradient ``dx`` of ``y`` and ``dy``."""
    columns = y.shape[-1]
    stages = backward_stages(columns)
    if stages is None or not _fits((y, dy), rows, columns, stride, grad_stride):
        return False
    _run(_backward, (y, dy, dx, rows, columns, stride, grad_stride), stages, rows)
    return True


def _fits(inputs: tuple[torch.Tensor, ...], rows: int, columns: int, *strides: int) -> bool:
    index = inputs[0].device.index
    return (
        all(value.element_size() == 2 and value.data_ptr() % 16 == 0 for value in inputs)
        and rows >= 2 * processors(index)
        and all(count % 16 == 0 for count in (columns, *strides))  # what Triton knows to be whole vectors
        and architecture(index) == "sm_90"
        and _forward() is not None
    )


def _run(kernel: Callable[[], Any], arguments: tuple[Any, ...], stages: Stages, rows: int) -> None:
    block, chunks, held, slots, warps, programs = stages
    launched = kernel()
    assert launched is not None
    at_once = min(rows, programs * processors(arguments[0].device.index))
    # as many programs, or fewer that have equally many rows
    launched((ceil_div(rows, ceil_div(rows, at_once)), 1, 1), arguments, (block, chunks, held, slots), warps)
