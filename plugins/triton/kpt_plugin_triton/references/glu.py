"""glu."""

from __future__ import annotations

import torch

from kpt_plugin_triton.references.activations import activation_of


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """``activation(gate) * up`` (Shazeer 2020, arXiv:2002.05202): silu, gelu, gelu_tanh or relu."""
    return activation_of(activation)(gate) * up
