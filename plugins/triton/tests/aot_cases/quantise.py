"""Quantisation to fp8, alone, behind norms and behind a gated activation, at common widths."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from kpt_plugin_triton import fp8, norms_fp8, quantise
from kpt_plugin_triton.references.quantise import MODES


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    for columns in (128, 768, 4096, 8192, 14336, 16384):
        for mode in MODES:
            yield f"norms {columns} {mode}", lambda columns=columns, mode=mode: _norms(columns, mode)
            yield f"others {columns} {mode}", lambda columns=columns, mode=mode: _others(columns, mode)
    yield "a given scale", lambda: _given(4096)
    for dtype in fp8.FP8:
        yield f"{dtype}", lambda dtype=dtype: _flavour(4096, dtype)


def _row(columns: int) -> torch.Tensor:
    return torch.empty(1000, columns, dtype=torch.bfloat16, device="meta")


def _norms(columns: int, mode: str) -> None:
    x = _row(columns)
    norms_fp8.rms_norm_fp8(x, x[0], mode=mode)
    if columns in (4096, 16384):
        norms_fp8.rms_norm_fp8(x, x[0], residual=x, mode=mode)
        norms_fp8.layer_norm_fp8(x, x[0], x[0], residual=x, mode=mode)


def _others(columns: int, mode: str) -> None:
    x = _row(columns)
    quantise.quantise_fp8(x, mode)
    quantise.silu_mul_fp8(x, x, mode)


def _given(columns: int) -> None:
    x, scale = _row(columns), torch.empty((), device="meta")
    norms_fp8.rms_norm_fp8(x, x[0], mode="tensor", scale=scale)
    quantise.silu_mul_fp8(x, x, "tensor", scale)


def _flavour(columns: int, dtype: torch.dtype) -> None:
    norms_fp8.rms_norm_fp8(_row(columns), dtype=dtype)
