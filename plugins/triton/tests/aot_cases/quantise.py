"""Quantisation to fp8, alone, behind norms and behind a gated activation, at common widths."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from kpt_plugin_triton import fp8, norms_fp8, quantise
from kpt_plugin_triton.references.quantise import MODES


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    yield from _in(torch.bfloat16)
    yield "a given scale", lambda: _given(4096)
    for dtype in fp8.FP8:
        yield f"{dtype}", lambda dtype=dtype: _flavour(4096, dtype)


def more() -> Iterator[tuple[str, Callable[[], None]]]:
    for dtype in (torch.float16, torch.float32):
        yield from _in(dtype)


def _in(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    for columns in (128, 768, 4096, 8192, 14336, 16384):
        for mode in MODES:
            yield f"norms {columns} {mode} {dtype}", lambda c=columns, m=mode: _norms(c, m, dtype)
            yield f"others {columns} {mode} {dtype}", lambda c=columns, m=mode: _others(c, m, dtype)


def _row(columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(1000, columns, dtype=dtype, device="meta")


def _norms(columns: int, mode: str, dtype: torch.dtype) -> None:
    x = _row(columns, dtype)
    norms_fp8.rms_norm_fp8(x, x[0], mode=mode)
    if columns in (4096, 16384):
        norms_fp8.rms_norm_fp8(x, x[0], residual=x, mode=mode)
        norms_fp8.layer_norm_fp8(x, x[0], x[0], residual=x, mode=mode)


def _others(columns: int, mode: str, dtype: torch.dtype) -> None:
    x = _row(columns, dtype)
    quantise.quantise_fp8(x, mode)
    quantise.silu_mul_fp8(x, x, mode)


def _given(columns: int) -> None:
    x, scale = _row(columns), torch.empty((), device="meta")
    norms_fp8.rms_norm_fp8(x, x[0], mode="tensor", scale=scale)
    quantise.silu_mul_fp8(x, x, "tensor", scale)


def _flavour(columns: int, dtype: torch.dtype) -> None:
    norms_fp8.rms_norm_fp8(_row(columns), dtype=dtype)
