"""Skinny products at the widths of common models, one row and sixteen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from kpt_plugin_triton import skinny

#: Kernels that have to use the matrix units.
DOTS = ("skinny_dot",)
WEIGHTS = (torch.int8, torch.float8_e4m3fn, torch.float8_e4m3fnuz)
_SHAPES = ((28672, 4096), (4096, 14336), (4096, 4096), (1024, 4096), (100, 4000))


def small(kernel: str, constants: Mapping[str, Any]) -> str:
    """Why tiles have fewer rows than wgmma and tcgen05 multiply."""
    return "16 rows are all that there are; reading the weight takes all the time"


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    yield from _products(torch.bfloat16)
    for name in skinny.ACTIVATIONS:
        yield f"bias and {name}", lambda name=name: _run(16, 4096, 4096, torch.bfloat16, name)


def more() -> Iterator[tuple[str, Callable[[], None]]]:
    yield from _products(torch.float16)


def _products(own: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """Inputs of a dtype, times weights of the same and of the 8-bit ones."""
    for features, depth in _SHAPES:
        for rows in (1, 16):
            for weight in (own, *WEIGHTS):
                yield (
                    f"{rows} x {features} x {depth} {own} {weight}",
                    lambda rows=rows, features=features, depth=depth, weight=weight: _run(
                        rows, features, depth, weight, own=own
                    ),
                )


def _run(
    rows: int,
    features: int,
    depth: int,
    dtype: torch.dtype,
    activation: str = "none",
    own: torch.dtype = torch.bfloat16,
) -> None:
    x = torch.empty(rows, depth, dtype=own, device="meta")
    weight = torch.empty(features, depth, dtype=dtype, device="meta")
    bias = torch.empty(features, dtype=own, device="meta")
    if dtype is own:
        skinny.linear(x, weight, bias, activation)
        return
    scale = torch.empty(features, device="meta")
    (skinny.linear_int8 if dtype is torch.int8 else skinny.linear_fp8)(x, weight, scale, None, activation)
