"""Passes that take `slow_models.SlowScale`'s detour out, and are wrong where few would look."""

from __future__ import annotations

import types
from typing import Any

import torch

from kpt.compiling import CompiledForward
from slow_models import DirectScale, SlowScale, fast_forward


class RootWrapper(DirectScale):
    """Wraps the root's forward with `around`."""

    def around(self, inner: Any, x: torch.Tensor) -> Any:
        return inner(x)

    def apply(self, model, variant):
        undo = super().apply(model, variant)
        inner = model.forward
        model.forward = types.MethodType(lambda _, x: self.around(inner, x), model)

        def take_back():
            model.__dict__.pop("forward", None)
            undo()

        return take_back


class Captured(DirectScale):
    """Right, and captures the whole forward: attributes become constants."""

    def apply(self, model, variant):
        undo = super().apply(model, variant)
        self.compiled = model.forward = CompiledForward(model.forward, backend="eager")

        def take_back():
            model.__dict__.pop("forward", None)
            undo()

        return take_back

    def verify_applied(self, model):
        return self.compiled.executions > 0


class ThirtyPercent(DirectScale):
    def replacement(self):
        return lambda self, x: fast_forward(self, x) * 1.3


class ColumnMajor(DirectScale):
    """Reads the storage as if rows were adjacent."""

    def replacement(self):
        return lambda self, x: fast_forward(self, x.as_strided(x.shape, (1, x.shape[0]), x.storage_offset()))


class LosesInputGradient(RootWrapper):
    """Every parameter's gradient is right; whatever computed the input is never trained."""

    def around(self, inner, x):
        return inner(x.detach())


class DetachesLogits(RootWrapper):
    """The loss is trained as ever; a loss of the user's own, made from the logits, is not."""

    def around(self, inner, x):
        output = inner(x)
        return {**output, "logits": output["logits"].detach()}


class Around(torch.nn.Module):
    """A model around a `SlowScale`."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.slow = SlowScale(width)


class NoisySlow(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.slow(x) + torch.randn_like(x)


class WithLoss(Around):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.slow(x)
        return {"loss": logits.pow(2).mean(), "logits": logits * 2}


class ComplexSlow(Around):
    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.weight = torch.nn.Parameter(torch.randn(width, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.complex(self.slow(x.real), x.imag) * self.weight
