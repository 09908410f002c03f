"""Cross entropy over rows of logits: the launches that `losses` and `linear_losses` are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from kpt_plugin_triton import staged_losses
from kpt_plugin_triton.kernels import losses as device
from kpt_plugin_triton.kernels import losses_backward
from kpt_plugin_triton.launch import Kernel, ceil_div, power_of_two, processors
from kpt_plugin_triton.rows import rows_of, unit_of, wide_dtype
from kpt_plugin_triton.tuning import Options, Tuned

#: Columns of a row that still goes into registers as a whole where a table asks for that, and bytes where
#: the rule decides.
_LONGEST = 32768
_LONGEST_BY_RULE = 32768
#: Partial counts of targets, at most.
_PARTS = 64

_count = Kernel(device.count_targets)
_finish = Kernel(device.finish_loss)
_short = Kernel(device.cross_entropy_short)
_long = Kernel(device.cross_entropy_long)
_gradient = Kernel(losses_backward.cross_entropy_gradient)


def _rule(itemsize: int, columns: int) -> dict[str, int]:
    block = power_of_two(columns)
    if block * itemsize <= _LONGEST_BY_RULE:
        rows = max(1, min(32, 2048 // block))
        warps = max(4, min(16, rows * block // 1024))
        return {"ROWS": rows, "BLOCK": block, "PROGRAMS": 32 // warps, "num_warps": warps}
    # ROWS = 0: rows are read twice. One program a multiprocessor, so that the row stays in its cache.
    programs = 1 if columns * itemsize > 98304 else 2
    return {
        "ROWS": 0,
        "BLOCK": min(16384 // itemsize, block // 4),
        "PROGRAMS": programs,
        "num_warps": 16 if itemsize == 2 else 8,
    }


def _candidates(itemsize: int, columns: int) -> Iterator[dict[str, int]]:
    block = power_of_two(columns)
    for warps in (2, 4, 8, 16, 32):
        for rows in (1, 2, 4, 8, 16, 32):
            if block <= _LONGEST and 8 <= rows * block // (32 * warps) <= 64:
                for programs in (1, 2, 4, 8, 16, 32):  # of few warps, many
                    if warps * programs <= 64:
                        yield {"ROWS": rows, "BLOCK": block, "PROGRAMS": programs, "num_warps": warps}
        for each in (4096, 8192, 16384, 32768):
            if columns > 8192 and warps >= 8 and each <= columns and each // (32 * warps) <= 64:
                for programs in (1, 2, 3, 4):
                    if warps * programs <= 64:
                        yield {"ROWS": 0, "BLOCK": each, "PROGRAMS": programs, "num_warps": warps}


def _loss_rule(itemsize: int, columns: int) -> dict[str, int]:
    """Long rows that are read once need no cache: many programs, of which one reads while another reduces."""
    options = _rule(itemsize, columns)
    if options["ROWS"] == 0:
        block, programs, warps = (4096, 4, 8) if itemsize == 2 else (1024, 8, 4)
        options |= {"BLOCK": min(block, options["BLOCK"]), "PROGRAMS": programs, "num_warps": warps}
    return options


def _loss_candidates(itemsize: int, columns: int) -> Iterator[dict[str, int]]:
    yield from _candidates(itemsize, columns)
    for each in (1024, 2048, 4096, 8192):
        for warps in (2, 4, 8):
            if columns > 8192 and 8 <= each // (32 * warps) <= 64:
                for programs in (4, 5, 6, 8, 12):
                    if warps * programs <= 64 and (warps, programs) != (8, 4):
                        yield {"ROWS": 0, "BLOCK": each, "PROGRAMS": programs, "num_warps": warps}


#: Of launches that write gradients, and of those that write none: the latter see each logit once.
options_of = Tuned("cross_entropy", ("columns",), _rule, _candidates)
loss_options = Tuned("cross_entropy_loss", ("columns",), _loss_rule, _loss_candidates)


def _options_for(logits: torch.Tensor, gradient: bool, options: Options | None) -> Options:
    if options is not None:
        return options
    table = options_of if gradient else loss_options
    return table(logits.device.index, logits.element_size(), logits.shape[-1])


@dataclass(frozen=True)
class Terms:
    """What a row's loss is made of besides its logits and label."""

    ignore_index: int = -100
    smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None

    def arguments(self) -> tuple[int, float, float, float]:
        return self.ignore_index, float(self.smoothing), float(self.z_loss), float(self.softcap or 0.0)

    def constants(self) -> tuple[bool, bool, bool]:
        return self.smoothing != 0.0, self.z_loss != 0.0, self.softcap is not None


@dataclass(frozen=True)
class Shared:
    """What all rows of a call have in common, on the device; see `shared`."""

    terms: Terms
    weight: torch.Tensor | None
    weight_total: torch.Tensor | None
    denominators: torch.Tensor | None
    parts: int


def shared(
    target: torch.Tensor, weight: torch.Tensor | None, terms: Terms, mean: bool, like: torch.Tensor
) -> Shared:
    """Counts the targets [rows] for a mean (their weights, with class weights) and sums the class weights.

    ``like`` [rows, classes] gives the dtype and the number of classes.
    """
    wide = wide_dtype(like.dtype)
    rows, classes = target.numel(), like.shape[-1]
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()
    total = weight.sum(dtype=wide) if weight is not None and terms.smoothing else None
    if not mean or rows == 0:
        return Shared(terms, weight, total, None, 0)
    parts = min(_PARTS, ceil_div(rows, 1024))
    counts = torch.empty(parts, dtype=wide, device=target.device)
    _count(
        (parts, 1, 1),
        (target, weight, counts, rows, classes, terms.ignore_index),
        (1024, accumulator(wide)),
        4,
    )
    return Shared(terms, weight, total, counts, parts)


def accumulator(wide: torch.dtype) -> Any:
    return tl.float64 if wide is torch.float64 else tl.float32


def programs_for(logits: torch.Tensor, terms: Terms, gradient: bool, options: Options | None = None) -> int:
    """How many programs `rows_forward` starts, which is the number of partial sums that it writes.

    ``gradient``: whether it is asked for one.
    """
    if options is None and staged_losses.takes(logits, gradient, terms):
        return staged_losses.programs_for(logits)
    return _portable_programs(logits, gradient, options)


def most_programs(logits: torch.Tensor, gradient: bool) -> int:
    """What `programs_for` is at most for as many rows or fewer."""
    at_once = min(len(logits), processors(logits.device.index))
    return max(at_once, _portable_programs(logits, gradient, None))


def _portable_programs(logits: torch.Tensor, gradient: bool, options: Options | None) -> int:
    rows = logits.numel() // logits.shape[-1]
    chosen = _options_for(logits, gradient, options)
    tiles = ceil_div(rows, max(1, chosen["ROWS"]))
    return min(tiles, chosen["PROGRAMS"] * processors(logits.device.index))


def rows_forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    common: Shared,
    *,
    lses: torch.Tensor | None = None,
    losses: torch.Tensor | None = None,
    partials: torch.Tensor | None = None,
    gradient: torch.Tensor | None = None,
    options: Options | None = None,
) -> None:
    """One launch over ``logits`` [rows, classes]; writes those of the four outputs that are given.

    ``lses`` and ``losses`` are [rows], ``partials`` [`programs_for`] sums of losses, not divided yet, and
    ``gradient`` contiguous [rows, classes], divided for a mean; it may be ``logits`` itself if that is
    contiguous. There must be at least one row.
    """
    columns, itemsize = logits.shape[-1], logits.element_size()
    if gradient is not None and options is None and staged_losses.takes(logits, True, common.terms):
        staged_losses.run(logits, target, common, lses, losses, partials, gradient, _PARTS)
        return
    flat, rows, stride = rows_of(logits)
    chosen = _options_for(logits, gradient is not None, options)
    programs = programs_for(logits, common.terms, gradient is not None, chosen)
    arguments = (
        *(flat, target, common.weight, common.weight_total, common.denominators),
        *(lses, losses, partials, gradient, rows, columns, stride, common.parts),
        *common.terms.arguments(),
    )
    last = (_PARTS, *common.terms.constants(), accumulator(wide_dtype(logits.dtype)))
    block, unit = power_of_two(columns), unit_of(itemsize, columns, stride)
    # smoothing and a soft cap take more registers for each column
    heavy = common.terms.softcap is not None or common.terms.smoothing != 0.0
    if chosen["ROWS"] and block <= _LONGEST:
        warps = min(16, 2 * chosen["num_warps"]) if heavy else chosen["num_warps"]
        _short((programs, 1, 1), arguments, (unit, block, chosen["ROWS"], *last), warps)
    else:  # a table's options may be for somewhat longer rows
        block = min(chosen["BLOCK"], block if block == columns else block // 2, 32768)
        vector = min(16 // itemsize, block)
        even = columns % vector == 0
        warps = chosen["num_warps"]
        if not even:  # columns are loaded one by one, each with an address
            block, warps = min(block, 2048 if heavy else 4096), 16
        elif heavy:
            block = max(block // 2, vector)
            warps = max(4, min(warps, block // vector // 32))  # a vector for each thread
        _long((programs, 1, 1), arguments, (unit, block, vector, even, *last), warps)


def rows_gradient(
    logits: torch.Tensor,
    target: torch.Tensor,
    common: Shared,
    lses: torch.Tensor,
    upstream: torch.Tensor,
    gradient: torch.Tensor,
    unless_one: bool = False,
) -> None:
    """``gradient`` [rows, classes] from logits and their lse, times ``upstream`` ([rows] or a scalar).

    With ``unless_one``, nothing happens if ``upstream`` is 1. ``gradient`` may be ``logits`` itself.
    """
    columns = logits.shape[-1]
    flat, rows, stride = rows_of(logits)
    if rows == 0:
        return
    itemsize = logits.element_size()
    unit = unit_of(itemsize, columns, stride)
    block = min(power_of_two(columns), 4096 if unit * itemsize == 16 else 1024)
    each = max(1, 2048 // power_of_two(columns))
    tiles = ceil_div(rows, each) * ceil_div(columns, block)
    programs = min(tiles, 8 * processors(logits.device.index))
    upstream_stride = upstream.stride(0) if upstream.dim() else 0
    _gradient(
        (programs, 1, 1),
        (
            *(flat, target, common.weight, common.weight_total, common.denominators, lses, upstream),
            *(gradient, rows, columns, stride, upstream_stride, common.parts),
            *common.terms.arguments(),
        ),
        (
            *(unit, block, each, _PARTS),
            *common.terms.constants(),
            *(accumulator(wide_dtype(logits.dtype)), unless_one),
        ),
        4,
    )


def finished(partials: torch.Tensor, common: Shared, dtype: torch.dtype) -> torch.Tensor:
    """The scalar loss from partial sums, divided by what was counted."""
    loss = torch.empty((), dtype=dtype, device=partials.device)
    _finish(
        (1, 1, 1),
        (partials, common.denominators, loss, partials.numel(), common.parts),
        (1024, _PARTS, accumulator(partials.dtype)),
        4,
    )
    return loss


def empty_loss(reduction: str, like: torch.Tensor) -> torch.Tensor:
    """The loss of no rows, as PyTorch defines it: NaN for a mean, 0 for a sum."""
    if reduction == "none":
        return torch.empty(0, dtype=like.dtype, device=like.device)
    value = float("nan") if reduction == "mean" else 0.0
    return torch.full((), value, dtype=like.dtype, device=like.device)
