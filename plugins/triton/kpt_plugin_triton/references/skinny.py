"""linear_int8 and linear_fp8: products with a quantised weight."""

from __future__ import annotations

import torch


def dequantised(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``weight`` [N, K] times ``scale`` ([N], or one number), rounded to ``dtype`` once."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factor = scale.to(wide).reshape(-1, 1)
    return (weight.to(wide) * factor).to(dtype)


def linear_int8(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``x @ (weight * scale).T + bias``: x [..., K], weight [N, K] int8, scale [N] fp32, bias [N]."""
    return torch.nn.functional.linear(x, dequantised(weight, scale, x.dtype), bias)


def linear_fp8(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The same with a weight in float8_e4m3fn or float8_e4m3fnuz; scale [N], or [1] for the whole weight."""
    return torch.nn.functional.linear(x, dequantised(weight, scale, x.dtype), bias)
