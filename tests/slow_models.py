"""Models with something to gain, small enough for tests, and a plugin that gains it."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from typing import Any

import torch

import kpt
from kpt.compiling import CompiledForward
from kpt.specs import KernelSpec, OpSpec, PassSpec, PolicySpec, Variant


class SlowScale(torch.nn.Module):
    """``x * weight + bias`` with a detour that changes no bit and takes about a hundred times as long."""

    def __init__(self, width: int = 16, rounds: int = 60) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(width))
        self.bias = torch.nn.Parameter(torch.randn(width))
        self.rounds = rounds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.rounds):
            x = x.neg().neg()
        return x * self.weight + self.bias


class SlowNorm(torch.nn.Module):
    """RMSNorm, one row at a time."""

    def __init__(self, width: int = 16, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(width) + 0.5)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        done = [row * torch.rsqrt(row.pow(2).mean(-1, keepdim=True) + self.eps) for row in rows.unbind(0)]
        return torch.stack(done).reshape(x.shape) * self.weight


class Net(torch.nn.Module):
    """Linear, the slow scale, batch norm, dropout, linear: parameters, buffers and randomness."""

    def __init__(self, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = torch.nn.Linear(width, width)
        self.slow = SlowScale(width)
        self.norm = torch.nn.BatchNorm1d(width)
        self.dropout = torch.nn.Dropout(dropout)
        self.last = torch.nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.dropout(self.norm(self.slow(self.first(x)))))


def net(training: bool = False, **options: Any) -> Net:
    torch.manual_seed(0)
    return Net(**options).train(training)


class Many(torch.nn.Module):
    """A forward with optional arguments, nested inputs and several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor, extra: dict | None = None, scale: float = 1.0, flag: bool = False):
        y = self.net(x) * scale
        if extra is not None:
            y = y + extra["bias"]
        return (y, x) if flag else y


def fast_forward(self: SlowScale, x: torch.Tensor) -> torch.Tensor:
    return x * self.weight + self.bias


class DirectScale:
    """The pass that takes the detour out of every `SlowScale`. Hostile passes override `replacement`."""

    variant = Variant("direct", predicted_gain=5.0, sites=(), reproducible=True)

    def replacement(self) -> Callable[..., torch.Tensor]:
        return fast_forward

    def propose(self, observation: Any, hardware: Any) -> Iterable[Variant]:
        return [self.variant]

    def apply(self, model: torch.nn.Module, variant: Variant) -> Callable[[], None]:
        changed = [module for module in model.modules() if isinstance(module, SlowScale)]
        function = self.replacement()
        for module in changed:
            module.forward = types.MethodType(function, module)  # type: ignore[method-assign]
        self.applied = len(changed)

        def undo() -> None:
            for module in changed:
                module.__dict__.pop("forward", None)

        return undo

    def verify_applied(self, model: torch.nn.Module) -> bool:
        return self.applied > 0


def fast_for_singles(self: SlowScale, x: torch.Tensor) -> torch.Tensor:
    for _ in range(0 if len(x) == 1 else 4 * self.rounds):
        x = x.neg().neg()
    return x * self.weight + self.bias


class SinglesOnly(DirectScale):
    """As `DirectScale` for a batch of one row; others take four times as long as before."""

    def replacement(self) -> Callable[..., torch.Tensor]:
        return fast_for_singles


class DerivedScale(DirectScale):
    """As `DirectScale`, with copies of the weights, so that the weights have to be watched."""

    variant = Variant("derived", predicted_gain=5.0, sites=(), derives=True)

    def apply(self, model: torch.nn.Module, variant: Variant) -> Callable[[], None]:
        undo = super().apply(model, variant)
        for module in model.modules():
            if isinstance(module, SlowScale):
                module.packed_weight = module.weight.detach().clone()
                module.packed_bias = module.bias.detach().clone()
        return undo

    def replacement(self) -> Callable[..., torch.Tensor]:
        return lambda self, x: x * self.packed_weight + self.packed_bias


class WholeByInductor(DirectScale):
    """Compiles the whole forward by inductor."""

    variant = Variant("whole", predicted_gain=2.0, sites=("",), setup_seconds=10.0)

    def apply(self, model: torch.nn.Module, variant: Variant) -> Callable[[], None]:
        self.compiled = model.forward = CompiledForward(model.forward, backend="inductor")
        return lambda: model.__dict__.pop("forward", None)

    def verify_applied(self, model: torch.nn.Module) -> bool:
        return self.compiled.executions > 0


def deep(layers: int, width: int = 16) -> torch.nn.Module:
    """A model that a compiler needs long for: many layers, each with arithmetic of its own."""
    torch.manual_seed(0)
    kinds = (torch.nn.GELU, torch.nn.SiLU, torch.nn.Tanh, torch.nn.Softplus, torch.nn.Mish)
    parts = [part for n in range(layers) for part in (torch.nn.Linear(width, width), kinds[n % len(kinds)]())]
    return torch.nn.Sequential(*parts).eval()


def plugin(
    *passes: type,
    kernels: Iterable[KernelSpec] = (),
    ops: Iterable[OpSpec] = (),
    policies: Iterable[PolicySpec] = (),
    modes: tuple[str, ...] = ("inference", "training"),
    phase: str = "layout",
    level: str = "exact",
) -> Any:
    """An inline plugin that offers the given pass classes (reachable as ``slow_models:Name``) and kernels."""

    class Plugin:
        __name__ = "toy"

        @kpt.hookimpl
        def kpt_passes(self) -> Iterable[PassSpec]:
            for offered in passes:
                yield PassSpec(
                    name=offered.__name__,
                    phase=phase,  # type: ignore[arg-type]
                    entry=f"{offered.__module__}:{offered.__qualname__}",
                    modes=modes,  # type: ignore[arg-type]
                    level=level,  # type: ignore[arg-type]
                )

        @kpt.hookimpl
        def kpt_ops(self) -> Iterable[OpSpec]:
            return ops

        @kpt.hookimpl
        def kpt_kernels(self) -> Iterable[KernelSpec]:
            yield from kernels

        @kpt.hookimpl
        def kpt_precision_policies(self) -> Iterable[PolicySpec]:
            yield from policies

    return Plugin()
