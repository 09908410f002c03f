"""Models that a plan is kept for, and what their reports say of calls."""

from __future__ import annotations

import types

import torch

import kpt
from slow_models import DirectScale, SlowScale, plugin


def optimised(model, x, **options):
    kpt.optimize(model, x, plugins=[plugin(DirectScale)], budget=20, cache=False, **options)
    assert kpt.report(model).optimized, kpt.report(model)
    return model


def reasons(model):
    return kpt.report(model).calls["reasons"]


class Scaled(SlowScale):
    def __init__(self) -> None:
        super().__init__(16)
        self.scaling = {"default": 1.0}
        self.temperature = torch.tensor(1.0)
        self.config = types.SimpleNamespace(double=False)
        self.settings = types.SimpleNamespace(inner=types.SimpleNamespace(triple=False))

    def forward(self, x):
        x = super().forward(x) * self.scaling["default"] / self.temperature
        x = x * 3 if self.settings.inner.triple else x
        return x * 2 if self.config.double else x


class Around(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Scaled()
        self.slow = SlowScale(16)

    def forward(self, x):
        return self.slow(self.inner(x))
