"""Gated units and bias + activation at the widths of common models."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from kpt_plugin_triton.activations import ACTIVATIONS, bias_activation
from kpt_plugin_triton.gated_mlp import gated_mlp
from kpt_plugin_triton.glu import glu


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    for activation in ACTIVATIONS:
        for fused in (False, True):
            yield f"glu {activation}", lambda a=activation, f=fused: _glu(a, f)
        yield f"bias_activation {activation}", lambda a=activation: _bias(a)
    yield "gated_mlp", _mlp


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)


def _glu(activation: str, fused: bool) -> None:
    gate, up = _empty(1000, 28672).chunk(2, dim=-1) if fused else (_empty(1000, 14336), _empty(1000, 14336))
    out = glu(gate, up, activation)
    out.backward(torch.empty_like(out))


def _bias(activation: str) -> None:
    out = bias_activation(_empty(1000, 3072), _empty(3072), activation)
    out.backward(torch.empty_like(out))


def _mlp() -> None:
    out = gated_mlp(_empty(100, 1024), _empty(4096, 1024), _empty(4096, 1024), _empty(1024, 4096))
    out.backward(torch.empty_like(out))
