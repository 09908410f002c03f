"""group_norm: its launches, and which of them a call takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from kpt_plugin_triton import group_norm_stripes as stripes
from kpt_plugin_triton.activations import wide_of
from kpt_plugin_triton.kernels import group_norm as device
from kpt_plugin_triton.kernels.norms import column_sums
from kpt_plugin_triton.launch import Kernel, ceil_div, power_of_two, processors
from kpt_plugin_triton.rows import wide_dtype
from kpt_plugin_triton.tuner import Workload, work_device
from kpt_plugin_triton.tuning import Options, Tuned

#: Elements of a group that one program keeps in registers; backward, they are of two tensors.
_LARGEST = 16384
_LARGEST_BACKWARD = 8192

_forward = Kernel(device.group_norm_forward)
_forward_sums = Kernel(device.group_norm_forward_sums)
_forward_apply = Kernel(device.group_norm_forward_apply)
_backward = Kernel(device.group_norm_backward)
_backward_sums = Kernel(device.group_norm_backward_sums)
_backward_apply = Kernel(device.group_norm_backward_apply)
_column_sums = Kernel(column_sums)


def _rule(itemsize: int, channels: int, spots: int) -> dict[str, int]:
    """For groups that many programs share: elements of a tile, programs for each multiprocessor."""
    return {"ELEMENTS": 2048, "PROGRAMS": 16, "num_warps": 4}


def _candidates(itemsize: int, channels: int, spots: int) -> Iterator[dict[str, int]]:
    for elements in (1024, 2048, 4096, 8192):
        for warps in (2, 4, 8, 16):
            if 4 <= elements // (32 * warps) <= 32:
                for programs in (4, 8, 16, 32):
                    yield {"ELEMENTS": elements, "PROGRAMS": programs, "num_warps": warps}


forward_options = Tuned("group_norm_forward", ("channels", "spots"), _rule, _candidates)
backward_options = Tuned("group_norm_backward", ("channels", "spots"), _rule, _candidates)


def evenly_laid(x: torch.Tensor) -> torch.Tensor:
    """``x`` [N, C, ...] dense, spots evenly spaced: itself if contiguous or channels last, else a copy."""
    if x.is_contiguous():
        return x
    dims = x.dim()
    if dims == 3 and x.transpose(1, 2).is_contiguous():
        return x
    if dims == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    if dims == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return x
    return x.contiguous()


def _steps(x: torch.Tensor) -> tuple[int, int, int]:
    """Elements from one batch entry, channel and spot to the next."""
    if x.dim() == 2:
        return x.stride(0), x.stride(1), 1
    batch, channel, spot = (x if x.dim() == 3 else x.view(*x.shape[:2], -1)).stride()
    return batch, channel, spot


def _like(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``grad`` with the strides of ``x``."""
    return grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)


def _striped(steps: tuple[int, int, int], spots: int) -> bool:
    """Whether the channels of a spot lie side by side, and the spots do not."""
    return steps[1] == 1 and steps[2] > 1 and spots > 1


def _tile(elements: int, channels: int, spots: int, step: int) -> tuple[int, int]:
    """(channels, spots) of a tile, as many as possible of those that lie side by side."""
    if step == 1:
        across = min(power_of_two(spots), elements)
        return min(power_of_two(channels), elements // across), across
    down = min(power_of_two(channels), elements)
    return down, min(power_of_two(spots), elements // down)


def _parts(options: Options, index: int | None, programs: int, spots: int, across: int) -> int:
    """Programs that share the spots of one channel block."""
    wanted = ceil_div(options["PROGRAMS"] * processors(index), programs)
    return max(1, min(wanted, ceil_div(spots, across), 1024))


def _warps(elements: int) -> int:
    return max(1, min(16, elements // 512))


def _pair(x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors; the halves of one would take the host longer."""
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def run_forward(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    silu: bool,
    statistics: bool,
    options: Options | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(y, mean, rstd); the last two are [N * groups] in fp32, and may be None unless asked for."""
    x = evenly_laid(x)
    y = torch.empty_like(x)
    batch, channels = x.shape[:2]
    wide = wide_dtype(x.dtype)
    mean = rstd = None
    if statistics:
        mean, rstd = _pair(x, (batch * groups,), wide)
    if x.numel() == 0:
        return y, mean, rstd
    group, spots = channels // groups, x.numel() // (batch * channels)
    steps, accumulate, index = _steps(x), wide_of(x.dtype), x.device.index
    whole = power_of_two(group) * power_of_two(spots)
    if whole <= _LARGEST and options is None:
        _forward(
            (batch * groups, 1, 1),
            (x, weight, bias, y, mean, rstd, groups, spots, *steps, eps),
            (group, power_of_two(group), power_of_two(spots), silu, accumulate),
            _warps(whole),
        )
        return y, mean, rstd
    if _striped(steps, spots):
        if mean is None or rstd is None:
            mean, rstd = _pair(x, (batch * groups,), wide)
        stripes.forward(x, y, groups, weight, bias, mean, rstd, eps, silu, (steps[0], steps[2]), options)
        return y, mean, rstd
    if options is None:
        options = forward_options(index, x.element_size(), group, spots)
    down, across = _tile(options["ELEMENTS"], group, spots, steps[2])
    programs = batch * groups * ceil_div(group, down)
    parts = _parts(options, index, programs, spots, across)
    sums = _pair(x, (batch, parts, channels), wide)
    _forward_sums(
        (programs, parts, 1),
        (x, *sums, groups, spots, *steps),
        (group, down, across, accumulate),
        options["num_warps"],
    )
    _forward_apply(
        (programs, parts, 1),
        (x, *sums, weight, bias, y, mean, rstd, groups, spots, *steps, eps),
        (group, down, across, _merge(parts * group), silu, accumulate),
        options["num_warps"],
    )
    return y, mean, rstd


def _merge(sums: int) -> int:
    return min(power_of_two(sums), 1024)


def run_backward(
    x: torch.Tensor,
    dy: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    silu: bool,
    want_weight: bool,
    want_bias: bool,
    options: Options | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(dx, dweight, dbias)."""
    x = evenly_laid(x)
    dx, dy = torch.empty_like(x), _like(dy, x)
    dweight = torch.empty_like(weight) if want_weight and weight is not None else None
    dbias = torch.empty_like(bias) if want_bias and bias is not None else None
    if x.numel() == 0:
        return dx, None if dweight is None else dweight.zero_(), None if dbias is None else dbias.zero_()
    batch, channels = x.shape[:2]
    group, spots = channels // groups, x.numel() // (batch * channels)
    steps, accumulate, index = _steps(x), wide_of(x.dtype), x.device.index
    wide = wide_dtype(x.dtype)
    whole, parts = power_of_two(group) * power_of_two(spots), 1
    by_weight = by_bias = None
    if whole <= _LARGEST_BACKWARD and options is None:
        if dweight is not None or dbias is not None:
            by_weight, by_bias = _pair(x, (batch, channels), wide)
        _backward(
            (batch * groups, 1, 1),
            (x, dy, weight, bias, mean, rstd, dx, by_weight, by_bias, groups, spots, *steps),
            (group, power_of_two(group), power_of_two(spots), silu, accumulate),
            _warps(whole),
        )
    elif _striped(steps, spots):
        how = weight, bias, mean, rstd, silu, (steps[0], steps[2]), options
        by_weight, by_bias = stripes.backward(x, dy, dx, groups, *how)
        parts = by_weight.shape[1]
    else:
        if options is None:
            options = backward_options(index, x.element_size(), group, spots)
        down, across = _tile(options["ELEMENTS"], group, spots, steps[2])
        programs = batch * groups * ceil_div(group, down)
        parts = _parts(options, index, programs, spots, across)
        by_weight, by_bias = _pair(x, (batch, parts, channels), wide)
        _backward_sums(
            (programs, parts, 1),
            (x, dy, weight, bias, mean, rstd, by_weight, by_bias, groups, spots, *steps),
            (group, down, across, silu, accumulate),
            options["num_warps"],
        )
        _backward_apply(
            (programs, parts, 1),
            (x, dy, weight, bias, mean, rstd, by_weight, by_bias, dx, groups, spots, *steps),
            (group, down, across, _merge(parts * group), silu, accumulate),
            options["num_warps"],
        )
    if dweight is not None or dbias is not None:
        _column_sums(
            (ceil_div(channels, 32), 1, 1),
            (by_weight, None if dbias is None else by_bias, *_targets(x, dweight, dbias), batch * parts),
            (channels, 32, 64, accumulate),
            8,
        )
    return dx, dweight, dbias


def _targets(
    x: torch.Tensor, dweight: torch.Tensor | None, dbias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Where column_sums writes; the sums by weight are always there, so they always need a place."""
    return (x.new_empty(x.shape[1]) if dweight is None else dweight), dbias


# ---------------------------------------------------------------------------------------------
# What tuning measures


def _work(dtype: torch.dtype, channels: int, spots: int) -> tuple[torch.Tensor, torch.Tensor]:
    batch = max(1, 2**26 // (32 * channels * spots * dtype.itemsize))
    x = torch.randn(batch, 32 * channels, spots, dtype=dtype, device=work_device())
    return x, torch.randn(32 * channels, dtype=dtype, device=work_device())


def _forward_work(dtype: torch.dtype, channels: int, spots: int) -> Callable[[Options], Callable[[], Any]]:
    x, weight = _work(dtype, channels, spots)
    return lambda options: lambda: run_forward(x, 32, weight, weight, 1e-5, True, False, options)


def _backward_work(dtype: torch.dtype, channels: int, spots: int) -> Callable[[Options], Callable[[], Any]]:
    x, weight = _work(dtype, channels, spots)
    mean = torch.zeros(32 * x.shape[0], dtype=torch.float32, device=x.device)

    def with_options(options: Options) -> Callable[[], Any]:
        return lambda: run_backward(x, x, 32, weight, weight, mean, mean, True, True, True, options)

    return with_options


_SIZES = ((10, 4096), (20, 1024), (4, 65536), (8, 262144))
WORKLOADS = [
    Workload(forward_options, _SIZES, _forward_work),
    Workload(backward_options, _SIZES, _backward_work),
]
