"""Norms over rows: the launches that `norms` and `embedding` are made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton.language as tl

from kpt_plugin_triton.kernels import norms as device
from kpt_plugin_triton.launch import Bound, Kernel, architecture, ceil_div, power_of_two, processors
from kpt_plugin_triton.rows import dense, rows_of, wide_dtype
from kpt_plugin_triton.tuning import Options, Tuned, remembered

#: Bytes of one row, and columns of one row in the backward pass, that still go into registers as a whole.
_LONGEST = 65536
_LONGEST_BACKWARD = 8192
_LONG_BLOCK = 4096
#: Bytes of shared memory for rows on their way where nothing was measured: every NVIDIA chip has so many.
_ON_THE_WAY = 98304

_forward = Kernel(device.norm_forward)
_forward_long = Kernel(device.norm_forward_long)
_backward = Kernel(device.norm_backward)
_backward_long = Kernel(device.norm_backward_long)
_weight_sums = Kernel(device.norm_weight_sums)
_column_sums = Kernel(device.column_sums)


def forward_rule(itemsize: int, columns: int) -> dict[str, int]:
    block = power_of_two(columns)
    return {
        "ROWS": max(1, min(32, 4096 // block)),
        "num_warps": max(1, min(16, block * itemsize // 1024)) if block > 1024 else 4,
    }


def _backward_rule(itemsize: int, columns: int) -> dict[str, int]:
    block = power_of_two(columns)
    return {
        "ROWS": max(1, min(16, 2048 // block)),
        "PROGRAMS": 2 if block > 2048 else 4,
        "num_warps": max(4, min(16, block // 512)),
        "STAGES": 0,  # as the chip allows, see `_stages`
    }


def _forward_candidates(itemsize: int, columns: int) -> Iterator[dict[str, int]]:
    block = power_of_two(columns)
    for rows in (1, 2, 4, 8, 16, 32):
        for warps in (1, 2, 4, 8, 16, 32):
            if 8 <= rows * block // (32 * warps) <= 128:
                yield {"ROWS": rows, "num_warps": warps}
    if columns >= 2048:  # ROWS = 0: rows are read twice
        for each in (1024, 2048, 4096, 8192):
            for warps in (4, 8, 16, 32):
                if each <= columns and 4 <= each // (32 * warps) <= 32:
                    yield {"ROWS": 0, "BLOCK": each, "num_warps": warps}


def _backward_candidates(itemsize: int, columns: int) -> Iterator[dict[str, int]]:
    block = power_of_two(columns)
    for rows in (1, 2, 4, 8, 16):
        for warps in (2, 4, 8, 16, 32):
            if 4 <= rows * block // (32 * warps) <= 32:
                for programs in (1, 2, 3, 4, 6, 8):
                    for stages in (1, 3):
                        held = (stages - 1) * 2 * rows * block * itemsize * programs
                        if warps * programs <= 48 and held <= 2 * _ON_THE_WAY:
                            yield {"ROWS": rows, "PROGRAMS": programs, "num_warps": warps, "STAGES": stages}


def _centred_rule(itemsize: int, columns: int) -> dict[str, int]:
    """Where layer_norm was never measured, what rms_norm was: 128 registers hold half as many of its rows."""
    found = dict(_backward_rule(itemsize, columns))
    if found["num_warps"] >= 16 and found["ROWS"] * power_of_two(columns) >= 32 * 32 * found["num_warps"]:
        found["ROWS"] = max(1, found["ROWS"] // 2)
    return found


forward_options = Tuned("norm_forward", ("columns",), forward_rule, _forward_candidates)
backward_options = Tuned("norm_backward", ("columns",), _backward_rule, _backward_candidates)
centred_forward_options = Tuned("layer_norm_forward", ("columns",), forward_rule, _forward_candidates)
centred_backward_options = Tuned("layer_norm_backward", ("columns",), _centred_rule, _backward_candidates)


def _accumulator(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def plan_forward(
    device: int | None,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    centred: bool,
    statistics: bool,
    added: bool,
    options: Options | None = None,
) -> Bound:
    """``added``: whether there is a residual, of which each column would be read twice as well."""
    rest = centred, statistics, _accumulator(dtype)
    if columns * dtype.itemsize > _LONGEST:
        return Bound(_forward_long, (rows, 1, 1), (columns, _LONG_BLOCK, 1, *rest), 8)
    if options is None:
        table = centred_forward_options if centred else forward_options
        options = table(device, dtype.itemsize, columns)
    if options["ROWS"] == 0 and added:
        options = forward_rule(dtype.itemsize, columns)
    each = options["ROWS"]
    if each == 0:
        constants = (columns, options["BLOCK"], 1, *rest)
        return Bound(_forward_long, (rows, 1, 1), constants, options["num_warps"])
    constants = (columns, power_of_two(columns), each, *rest)
    return Bound(_forward, (ceil_div(rows, each), 1, 1), constants, options["num_warps"])


def _stages(device: int | None, itemsize: int, elements: int) -> int:
    """How many tiles of so many elements the backward pass has under way where nothing was measured.

    On NVIDIA's chips it is the one that is worked on and two more, of x, dy and a residual's gradient.
    """
    fits = 3 * 2 * elements * itemsize <= _ON_THE_WAY
    return 3 if fits and architecture(device).startswith("sm_") else 1


class _BackwardPlan(NamedTuple):
    """The launch for dx (which leaves partial sums, unless ``sums`` does), and the one that adds them up."""

    main: Bound
    sums: Bound | None
    programs: int
    total: Bound


def plan_backward(
    device: int | None,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    centred: bool,
    options: Options | None = None,
) -> _BackwardPlan:
    wide = _accumulator(dtype)
    total = Bound(_column_sums, (ceil_div(columns, 32), 1, 1), (columns, 32, 64, wide), 8)
    if columns > _LONGEST_BACKWARD:
        programs = min(rows, 32)
        main = Bound(_backward_long, (rows, 1, 1), (columns, _LONG_BLOCK, centred, wide), 8)
        grid = ceil_div(columns, 512), programs, 1
        return _BackwardPlan(
            main, Bound(_weight_sums, grid, (columns, 512, centred, wide), 4), programs, total
        )
    if options is None:
        table = centred_backward_options if centred else backward_options
        options = table(device, dtype.itemsize, columns)
    each = options["ROWS"]
    programs = min(ceil_div(rows, each), options["PROGRAMS"] * processors(device))
    block = power_of_two(columns)
    stages = options.get("STAGES", 1) or _stages(device, dtype.itemsize, each * block)
    constants = (columns, block, each, centred, wide, stages)
    main = Bound(_backward, (programs, 1, 1), constants, options["num_warps"])
    return _BackwardPlan(main, None, programs, total)


_forward_plan = remembered(plan_forward)
_backward_plan = remembered(plan_backward)


def run_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
    statistics: bool,
    options: Any = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(y, x + residual, mean, rstd); the last two are [rows] in fp32, and None unless asked for."""
    columns = stride = x.shape[-1]
    if x.is_contiguous() and columns:  # `dense` and `rows_of` written out: each call of theirs takes 1 µs
        y, flat, rows = torch.empty_like(x), x, x.numel() // columns
    else:
        y = dense(x)
        flat, rows, stride = rows_of(x)
    total = None if residual is None else torch.empty_like(y)
    mean = rstd = None
    if statistics:
        wide = wide_dtype(x.dtype)
        rstd = x.new_empty(rows, dtype=wide)
        if centred:
            mean = x.new_empty(rows, dtype=wide)
    if rows == 0:
        return y, total, mean, rstd
    other, other_stride = None, 0
    if residual is not None:
        other, _, other_stride = rows_of(residual)
    shape = x.device.index, x.dtype, rows, columns, centred, statistics, residual is not None
    plan = _forward_plan(*shape) if options is None else plan_forward(*shape, options)
    plan.start(flat, other, weight, bias, y, total, mean, rstd, rows, stride, other_stride, eps, offset)
    return y, total, mean, rstd


def run_backward(
    x: torch.Tensor,
    dy: torch.Tensor,
    dtotal: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    want_weight: bool,
    want_bias: bool,
    options: Any = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(dx, dweight, dbias); ``x`` is what was normalised, the sum where a residual was added."""
    columns = stride = grad_stride = x.shape[-1]
    if x.is_contiguous() and dy.is_contiguous() and columns:
        dx, flat, grad, rows = torch.empty_like(x), x, dy, x.numel() // columns
    else:
        dx = dense(x)
        flat, rows, stride = rows_of(x)
        grad, _, grad_stride = rows_of(dy)
    more, more_stride = None, 0
    if dtotal is not None:
        more, _, more_stride = rows_of(dtotal)
    dweight = torch.empty_like(weight) if want_weight and weight is not None else None
    dbias = torch.empty_like(bias) if want_bias and bias is not None else None
    if rows == 0:
        return dx, None if dweight is None else dweight.zero_(), None if dbias is None else dbias.zero_()
    shape = x.device.index, x.dtype, rows, columns, mean is not None
    plan = _backward_plan(*shape) if options is None else plan_backward(*shape, options)
    weight_sums = bias_sums = None
    if dweight is not None:
        weight_sums = rstd.new_empty((plan.programs, columns))
    if dbias is not None:
        bias_sums = rstd.new_empty((plan.programs, columns))
    strides = stride, grad_stride, more_stride
    if plan.sums is None:
        plan.main.start(
            *(flat, grad, more, weight, mean, rstd, dx, weight_sums, bias_sums, rows), *strides, offset
        )
    else:
        plan.main.start(flat, grad, more, weight, mean, rstd, dx, *strides, offset)
    if dweight is not None or dbias is not None:
        if plan.sums is not None:
            plan.sums.start(flat, grad, mean, rstd, weight_sums, bias_sums, rows, stride, grad_stride)
        plan.total.start(weight_sums, bias_sums, dweight, dbias, plan.programs)
    return dx, dweight, dbias
