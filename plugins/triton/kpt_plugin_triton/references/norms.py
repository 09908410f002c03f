"""add_layer_norm."""

from __future__ import annotations

import torch

from kpt.ops import reference


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(layer_norm(x + residual), x + residual)``: what a pre-norm block does between two sublayers."""
    total = x + residual
    return reference("layer_norm")(total, weight, bias, eps), total  # type: ignore[no-any-return]
