"""Skinny products at the widths of common models, one row and sixteen."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from kpt_plugin_triton import skinny

#: Kernels that have to use the matrix units.
DOTS = ("skinny_dot",)
_SHAPES = ((28672, 4096), (4096, 14336), (4096, 4096), (1024, 4096), (100, 4000))


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    for features, depth in _SHAPES:
        for rows in (1, 16):
            for dtype in (torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.float8_e4m3fnuz):
                yield (
                    f"{rows} x {features} x {depth} {dtype}",
                    lambda rows=rows, features=features, depth=depth, dtype=dtype: _run(
                        rows, features, depth, dtype
                    ),
                )
    for name in skinny.ACTIVATIONS:
        yield f"bias and {name}", lambda name=name: _run(16, 4096, 4096, torch.bfloat16, name)


def _run(rows: int, features: int, depth: int, dtype: torch.dtype, activation: str = "none") -> None:
    x = torch.empty(rows, depth, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(features, depth, dtype=dtype, device="meta")
    bias = torch.empty(features, dtype=torch.bfloat16, device="meta")
    if dtype is torch.bfloat16:
        skinny.linear(x, weight, bias, activation)
        return
    scale = torch.empty(features, device="meta")
    (skinny.linear_int8 if dtype is torch.int8 else skinny.linear_fp8)(x, weight, scale, None, activation)
