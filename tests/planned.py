"""Nets with a committed plan, that reads live weights or derived copies, and what they are compared with."""

from __future__ import annotations

import pytest
import torch

from fingerprints import fast_calls, optimized
from slow_models import DerivedScale, DirectScale, Net, net, plugin

PLANS = {"live": DirectScale, "derived": DerivedScale}


plans = pytest.mark.parametrize("plan", PLANS)


def ready(plan: str = "live", *, training: bool = False, **options: object) -> tuple[Net, torch.Tensor]:
    """An optimised model and the example that it was optimised for."""
    model, example = net(training), torch.randn(32, 16)
    optimized(model, example, plugins=[plugin(PLANS[plan])], **options)
    assert fast_calls(model) == 0
    return model, example


def eager(model: Net) -> Net:
    """A model without any plan that shares the weights."""
    twin = net(model.training)
    twin.load_state_dict(model.state_dict())
    return twin


def agrees(model: Net, example: torch.Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(model(example), eager(model)(example))


def trains(model: Net, example: torch.Tensor) -> None:
    """One step that moves every parameter well beyond rounding."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(example).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
