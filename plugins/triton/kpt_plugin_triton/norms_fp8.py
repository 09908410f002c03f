"""rms_norm and layer_norm whose result is quantised to fp8 in the same pass."""

from __future__ import annotations

from typing import Any

import torch

from kpt_plugin_triton.quantise import quantised

_NAMES = ("x", "residual")


def rms_norm_fp8(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    residual: torch.Tensor | None = None,
    mode: str = "row",
    scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, ...]:
    """`quantise_fp8` of ``rms_norm(x + residual)``: (fp8, scale), with a residual also x + residual.

    The normalised values are quantised from fp32, not rounded to the dtype of x in between; x + residual is
    of that dtype. At most 16384 columns. Modes, dtypes, strides and errors as for `quantise_fp8`, all else as
    for `rms_norm`.
    """
    return _of("rms_norm_fp8", "rms", x, residual, weight, None, scale, eps, offset, mode, dtype)


def layer_norm_fp8(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
    mode: str = "row",
    scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, ...]:
    """`quantise_fp8` of ``layer_norm(x + residual)``, as `rms_norm_fp8`."""
    return _of("layer_norm_fp8", "layer", x, residual, weight, bias, scale, eps, 0.0, mode, dtype)


def _of(
    op: str,
    kind: str,
    x: Any,
    residual: Any,
    weight: Any,
    bias: Any,
    scale: Any,
    eps: float,
    offset: float,
    mode: str,
    dtype: Any,
) -> tuple[torch.Tensor, ...]:
    q, found, total = quantised(op, _NAMES, kind, x, residual, weight, bias, scale, eps, offset, mode, dtype)
    if residual is None:
        return q, found
    assert total is not None
    return q, found, total
