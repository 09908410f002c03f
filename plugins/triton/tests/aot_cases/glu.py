"""Gated units and bias + activation at the widths of common models."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from kpt_plugin_triton.activations import ACTIVATIONS, bias_activation
from kpt_plugin_triton.gated_mlp import gated_mlp
from kpt_plugin_triton.glu import glu


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    yield from _in(torch.bfloat16)


def more() -> Iterator[tuple[str, Callable[[], None]]]:
    for dtype in (torch.float16, torch.float32):
        yield from _in(dtype)


def _in(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    for activation in ACTIVATIONS:
        for fused in (False, True):
            name = f"glu {activation} {dtype}{' in one tensor' if fused else ''}"
            yield name, lambda a=activation, f=fused: _glu(a, f, dtype)
        yield f"bias_activation {activation} {dtype}", lambda a=activation: _bias(a, dtype)
    yield f"gated_mlp {dtype}", lambda: _mlp(dtype)


def _empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def _glu(activation: str, fused: bool, dtype: torch.dtype) -> None:
    halves = _empty(dtype, 1000, 28672).chunk(2, dim=-1)
    gate, up = halves if fused else (_empty(dtype, 1000, 14336), _empty(dtype, 1000, 14336))
    out = glu(gate, up, activation)
    out.backward(torch.empty_like(out))


def _bias(activation: str, dtype: torch.dtype) -> None:
    out = bias_activation(_empty(dtype, 1000, 3072), _empty(dtype, 3072), activation)
    out.backward(torch.empty_like(out))


def _mlp(dtype: torch.dtype) -> None:
    x, gate, up = _empty(dtype, 100, 1024), _empty(dtype, 4096, 1024), _empty(dtype, 4096, 1024)
    out = gated_mlp(x, gate, up, _empty(dtype, 1024, 4096))
    out.backward(torch.empty_like(out))
