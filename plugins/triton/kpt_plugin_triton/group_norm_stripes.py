"""group_norm of large groups whose channels lie side by side in memory: the launches of its kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from kpt_plugin_triton.activations import wide_of
from kpt_plugin_triton.kernels import group_norm_stripes as device
from kpt_plugin_triton.launch import Kernel, ceil_div, power_of_two, processors
from kpt_plugin_triton.rows import wide_dtype
from kpt_plugin_triton.tuner import Workload, work_device
from kpt_plugin_triton.tuning import Options, Tuned

#: Channels of a stripe, of which the one with the fewest idle is taken: all are whole lines of memory.
_ACROSS = (256, 128, 64)
#: Partial sums that a program merges at a time.
_MERGE = 1024

_forward_sums = Kernel(device.stripe_forward_sums)
_forward_merge = Kernel(device.stripe_forward_merge)
_forward_apply = Kernel(device.stripe_forward_apply)
_backward_sums = Kernel(device.stripe_backward_sums)
_backward_merge = Kernel(device.stripe_backward_merge)
_backward_apply = Kernel(device.stripe_backward_apply)


def _rule(itemsize: int, channels: int, spots: int) -> dict[str, int]:
    """Elements of a tile, programs for each multiprocessor."""
    return {"ELEMENTS": 2048 if itemsize <= 4 else 1024, "PROGRAMS": 8, "num_warps": 2}


def _candidates(itemsize: int, channels: int, spots: int) -> Iterator[dict[str, int]]:
    for elements in (1024, 2048, 4096, 8192):
        for warps in (2, 4, 8):
            if 8 <= elements // (32 * warps) <= 32:
                for programs in (4, 8, 16, 32):
                    yield {"ELEMENTS": elements, "PROGRAMS": programs, "num_warps": warps}


forward_options = Tuned("group_norm_stripes_forward", ("channels", "spots"), _rule, _candidates)
backward_options = Tuned("group_norm_stripes_backward", ("channels", "spots"), _rule, _candidates)


def _across(channels: int) -> int:
    if channels <= _ACROSS[-1]:
        return power_of_two(channels)
    return min(_ACROSS, key=lambda across: (ceil_div(channels, across) * across, -across))


def _grid(
    options: Options, x: torch.Tensor, channels: int, spots: int
) -> tuple[tuple[int, int, int], int, int]:
    """(programs: stripes and parts of the spots, channels of a tile, its spots)."""
    across = min(_across(channels), options["ELEMENTS"])
    down = min(power_of_two(spots), options["ELEMENTS"] // across)
    stripes = x.shape[0] * ceil_div(channels, across)
    wanted = ceil_div(options["PROGRAMS"] * processors(x.device.index), stripes)
    return (stripes, max(1, min(wanted, ceil_div(spots, down), 1024)), 1), across, down


def _merge(sums: int) -> int:
    return min(power_of_two(sums), _MERGE)


def forward(
    x: torch.Tensor,
    y: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    eps: float,
    silu: bool,
    steps: tuple[int, int],
    options: Options | None,
) -> None:
    """Fill ``y``, and ``mean`` and ``rstd`` [N * groups]; ``steps``: from one entry, one spot to the next."""
    batch, channels = x.shape[:2]
    group, spots = channels // groups, x.numel() // (batch * channels)
    if options is None:
        options = forward_options(x.device.index, x.element_size(), channels, spots)
    grid, across, down = _grid(options, x, channels, spots)
    accumulate, wide = wide_of(x.dtype), wide_dtype(x.dtype)
    sums, squares = (x.new_empty((batch, grid[1], channels), dtype=wide) for _ in range(2))
    _forward_sums(
        grid,
        (x, sums, squares, channels, spots, *steps),
        (group, across, down, accumulate),
        options["num_warps"],
    )
    _forward_merge(
        (batch * groups, 1, 1),
        (x, sums, squares, mean, rstd, grid[1], groups, spots, steps[0], eps),
        (group, _merge(grid[1] * group), accumulate),
        4,
    )
    _forward_apply(
        grid,
        (x, mean, rstd, weight, bias, y, channels, spots, *steps),
        (group, across, down, silu, accumulate),
        options["num_warps"],
    )


def backward(
    x: torch.Tensor,
    dy: torch.Tensor,
    dx: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    silu: bool,
    steps: tuple[int, int],
    options: Options | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill ``dx``; the gradients of weight and bias before they are added up, [N, parts, C] each."""
    batch, channels = x.shape[:2]
    group, spots = channels // groups, x.numel() // (batch * channels)
    if options is None:
        options = backward_options(x.device.index, x.element_size(), channels, spots)
    grid, across, down = _grid(options, x, channels, spots)
    accumulate, wide = wide_of(x.dtype), wide_dtype(x.dtype)
    by_weight, by_bias = (x.new_empty((batch, grid[1], channels), dtype=wide) for _ in range(2))
    shared, common = (x.new_empty(batch * groups, dtype=wide) for _ in range(2))
    _backward_sums(
        grid,
        (x, dy, weight, bias, mean, rstd, by_weight, by_bias, channels, spots, *steps),
        (group, across, down, silu, accumulate),
        options["num_warps"],
    )
    _backward_merge(
        (batch * groups, 1, 1),
        (by_weight, by_bias, weight, shared, common, grid[1], groups, spots),
        (group, _merge(grid[1] * group), accumulate),
        4,
    )
    _backward_apply(
        grid,
        (x, dy, weight, bias, mean, rstd, shared, common, dx, channels, spots, *steps),
        (group, across, down, silu, accumulate),
        options["num_warps"],
    )
    return by_weight, by_bias


# ---------------------------------------------------------------------------------------------
# What tuning measures


def _work(dtype: torch.dtype, channels: int, spots: int) -> tuple[torch.Tensor, ...]:
    batch = max(1, 2**26 // (channels * spots * dtype.itemsize))
    x = torch.randn(batch, spots, channels, dtype=dtype, device=work_device()).transpose(1, 2)
    weight = torch.randn(channels, dtype=dtype, device=work_device())
    mean = torch.zeros(32 * batch, dtype=torch.float32, device=x.device)
    return x, weight, mean


def _forward_work(dtype: torch.dtype, channels: int, spots: int) -> Callable[[Options], Callable[[], Any]]:
    x, weight, mean = _work(dtype, channels, spots)

    def with_options(options: Options) -> Callable[[], Any]:
        def call() -> torch.Tensor:
            y = torch.empty_like(x)
            rstd = torch.empty_like(mean)
            steps = x.stride(0), x.stride(2)
            forward(x, y, 32, weight, weight, torch.empty_like(mean), rstd, 1e-5, True, steps, options)
            return y

        return call

    return with_options


def _backward_work(dtype: torch.dtype, channels: int, spots: int) -> Callable[[Options], Callable[[], Any]]:
    x, weight, mean = _work(dtype, channels, spots)
    rstd = torch.ones_like(mean)

    def with_options(options: Options) -> Callable[[], Any]:
        def call() -> torch.Tensor:
            dx = torch.empty_like(x)
            steps = x.stride(0), x.stride(2)
            backward(x, x, dx, 32, weight, weight, mean, rstd, True, steps, options)
            return dx

        return call

    return with_options


_SIZES = ((320, 4096), (640, 1024), (128, 262144), (256, 65536), (512, 4096))
WORKLOADS = [
    Workload(forward_options, _SIZES, _forward_work),
    Workload(backward_options, _SIZES, _backward_work),
]
