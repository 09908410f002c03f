"""bias_activation."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kpt.ops.references.mlp import ACTIVATIONS


def activation_of(name: str) -> Callable[..., torch.Tensor]:
    """The function of an activation's name; raises ValueError for one that is not known."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def bias_activation(
    x: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "gelu"
) -> torch.Tensor:
    """``activation(x + bias)`` for ``x`` [..., D] and ``bias`` [D]: silu, gelu, gelu_tanh or relu."""
    return activation_of(activation)(x if bias is None else x + bias)
