"""A model with something to gain in every phase, and the plugin that gains it."""

from __future__ import annotations

import types
from typing import Any

import torch

import slow_models
from kpt.compiling import CompiledForward
from kpt.specs import KernelSpec, PolicySpec, Variant


class SlowLinear(torch.nn.Linear):
    """A linear layer, one column at a time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        columns = [x @ row + bias for row, bias in zip(self.weight.unbind(0), self.bias.unbind(0))]
        return torch.stack(columns, -1)


class SlowTail(torch.nn.Module):
    """Identity with a detour."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(60):
            x = x.neg().neg()
        return x


class Mixed(torch.nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first = torch.nn.Linear(width, width)
        self.scale = slow_models.SlowScale(width)
        self.norm = slow_models.SlowNorm(width)
        self.wide = SlowLinear(width, width)
        self.tail = SlowTail()
        self.last = torch.nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.tail(self.wide(self.norm(self.scale(self.first(x))))))


def mixed() -> Mixed:
    torch.manual_seed(0)
    return Mixed().eval()


class HalfWide(slow_models.DirectScale):
    """A precision policy: the wide layer in bf16, from a cast copy of its weights."""

    variant = Variant("half", predicted_gain=2.0, sites=(), compute_dtype="bfloat16", derives=True)

    def apply(self, model: torch.nn.Module, variant: Variant) -> Any:
        layer = model.wide
        layer.cast_weight = layer.weight.detach().to(torch.bfloat16)
        layer.cast_bias = layer.bias.detach().to(torch.bfloat16)

        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            half = torch.nn.functional.linear(x.to(torch.bfloat16), self.cast_weight, self.cast_bias)
            return half.to(x.dtype)

        layer.forward = types.MethodType(forward, layer)
        self.applied = 1
        return lambda: layer.__dict__.pop("forward", None)


class Compiled(slow_models.DirectScale):
    """Takes the tail's detour out and captures the whole forward as one graph."""

    backend = "eager"
    variant = Variant("compiled", predicted_gain=2.0, sites=("",), setup_seconds=0.5)

    def apply(self, model: torch.nn.Module, variant: Variant) -> Any:
        model.tail.forward = types.MethodType(lambda self, x: x, model.tail)
        self.compiled = model.forward = CompiledForward(model.forward, backend=self.backend)
        return lambda: model.__dict__.pop("forward", None)

    def verify_applied(self, model: torch.nn.Module) -> bool:
        return self.compiled.executions > 0


class CompiledByInductor(Compiled):
    """Compiles the last layer only: of the whole model, inductor would take every detour out by itself."""

    def apply(self, model: torch.nn.Module, variant: Variant) -> Any:
        model.tail.forward = types.MethodType(lambda self, x: x, model.tail)
        self.compiled = model.last.forward = CompiledForward(model.last.forward, backend="inductor")
        return lambda: model.last.__dict__.pop("forward", None)


def plugins(compiled: type = Compiled) -> list[Any]:
    """Inline plugins that offer a layout pass, a kernel, a precision policy and a compiler pass."""
    kernel = KernelSpec(
        op="rms_norm",
        name="right",
        entry="slow_kernels:right",
        backward=True,
        compile_safe=True,
        predicted_gain=2.0,
    )
    policy = PolicySpec("HalfWide", entry="mixed_models:HalfWide", compute_dtype="bfloat16")
    return [
        slow_models.plugin(slow_models.DirectScale, kernels=[kernel], policies=[policy]),
        slow_models.plugin(compiled, phase="compile", modes=("inference",)),
    ]
