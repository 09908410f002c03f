"""A model with something to gain in every phase, and the plugin that gains it."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch

import kpt
import slow_models
from kpt.compiling import CompiledForward
from kpt.specs import KernelSpec, PolicySpec, Variant


def detour(x: torch.Tensor, rounds: int) -> torch.Tensor:
    """``x``, bit for bit, and late."""
    for _ in range(rounds):
        x = x.neg().neg()
    return x


class SlowLinear(torch.nn.Linear):
    """A linear layer, one column at a time, after a detour."""

    rounds = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = detour(x, self.rounds)
        columns = [x @ row + bias for row, bias in zip(self.weight.unbind(0), self.bias.unbind(0))]
        return torch.stack(columns, -1)


class SlowTail(torch.nn.Module):
    """Identity with a detour."""

    rounds = 60

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return detour(x, self.rounds)


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


def mixed(training: bool = False, *, rounds: int | None = None) -> Mixed:
    """The model; ``rounds`` makes each detour longer, where other processes disturb the clock."""
    torch.manual_seed(0)
    model = Mixed().train(training)
    if rounds is not None:
        model.scale.rounds = model.wide.rounds = model.tail.rounds = rounds
    return model


def inner(model: torch.nn.Module) -> Any:
    """The `Mixed` in a model that wraps it, or the model itself."""
    return next(module for module in model.modules() if isinstance(module, Mixed))


class HalfWide(slow_models.DirectScale):
    """A precision policy: the wide layer in bf16, from a cast copy of its weights."""

    variant = Variant(
        "half", predicted_gain=2.0, sites=(), compute_dtype="bfloat16", derives=True, reproducible=True
    )

    def apply(self, model: torch.nn.Module, variant: Variant) -> Any:
        layer = inner(model).wide
        layer.cast_weight = layer.weight.detach().to(torch.bfloat16)
        layer.cast_bias = layer.bias.detach().to(torch.bfloat16)

        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            half = torch.nn.functional.linear(x.to(torch.bfloat16), self.cast_weight, self.cast_bias)
            return half.to(x.dtype)

        layer.forward = types.MethodType(forward, layer)
        self.applied = 1
        return lambda: layer.__dict__.pop("forward", None)


class HalfWideLive(slow_models.DirectScale):
    """The same for training: the weights are cast in each call, and get their gradients."""

    variant = Variant("half", predicted_gain=2.0, sites=(), compute_dtype="bfloat16", reproducible=True)

    def apply(self, model: torch.nn.Module, variant: Variant) -> Any:
        layer = inner(model).wide

        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            operands = (x.to(torch.bfloat16), self.weight.to(torch.bfloat16), self.bias.to(torch.bfloat16))
            return torch.nn.functional.linear(*operands).to(x.dtype)

        layer.forward = types.MethodType(forward, layer)
        self.applied = 1
        return lambda: layer.__dict__.pop("forward", None)


class Compiled(slow_models.DirectScale):
    """Takes the tail's detour out and captures the whole forward as one graph."""

    backend = "eager"
    variant = Variant("compiled", predicted_gain=2.0, sites=("",), setup_seconds=0.5, reproducible=True)

    def compiled_module(self, model: torch.nn.Module) -> torch.nn.Module:
        """Whose forward is compiled."""
        return inner(model)

    def apply(self, model: torch.nn.Module, variant: Variant) -> Any:
        tail, module = inner(model).tail, self.compiled_module(model)
        tail.forward = types.MethodType(lambda self, x: x, tail)
        self.compiled = module.forward = CompiledForward(module.forward, backend=self.backend)
        return lambda: [changed.__dict__.pop("forward", None) for changed in (module, tail)]

    def verify_applied(self, model: torch.nn.Module) -> bool:
        return self.compiled.executions > 0


@functools.cache
def started_inductor() -> None:
    """Compile something once, so that no trial pays for what inductor does once in a process.

    It is imported, and probes the instruction sets: torch 2.11 starts an interpreter for each, which imports
    torch. With the CUDA build on two cores that took 17 to 25 s, and a deadline for half a second of set-up
    passed.
    """
    CompiledForward(torch.nn.Tanh().forward, backend="inductor")(torch.zeros(4, 4))


class CompiledByInductor(Compiled):
    """Compiles the last layer only: of the whole model, inductor would take every detour out by itself."""

    backend = "inductor"

    def compiled_module(self, model: torch.nn.Module) -> torch.nn.Module:
        return inner(model).last


def plugins(compiled: type = Compiled, *, training: bool = False) -> list[Any]:
    """Inline plugins that offer a layout pass, a kernel, a precision policy and a compiler pass."""
    if compiled is CompiledByInductor:
        started_inductor()
    kernel = KernelSpec(
        op="rms_norm",
        name="right",
        entry="slow_kernels:right",
        backward=True,
        compile_safe=True,
        predicted_gain=2.0,
        reproducible=True,
    )
    policy = HalfWideLive if training else HalfWide
    modes = ("inference", "training")
    policies = [
        PolicySpec(
            policy.__name__, entry=f"mixed_models:{policy.__name__}", compute_dtype="bfloat16", modes=modes
        )
    ]
    return [
        slow_models.plugin(slow_models.DirectScale, kernels=[kernel], policies=policies),
        slow_models.plugin(compiled, phase="compile"),
    ]


#: The kinds of change that a committed plan of these plugins consists of.
EVERY_PHASE = {"layout", "kernels", "precision", "compile"}


def phases(model: torch.nn.Module) -> set[str]:
    """The phases of the plan that was committed for ``model``."""
    return {entry.phase for entry in kpt.report(model).accepted}
