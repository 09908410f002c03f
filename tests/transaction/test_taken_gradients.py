"""Forwards that take a gradient themselves, as those that give the forces of an energy."""

from __future__ import annotations

import contextlib

import pytest
import torch

import kpt
from fingerprints import fast_calls, optimized
from slow_models import DirectScale, net, plugin


class Forces(torch.nn.Module):
    """The gradient of an energy; ``own`` says that it sees to it that gradients are recorded."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.own, self.energy = own, net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad() if self.own else contextlib.nullcontext():
            x = x.detach().requires_grad_()
            return -torch.autograd.grad(self.energy(x).sum(), x)[0]


def test_a_forward_that_takes_a_gradient_comes_back_with_what_to_do() -> None:
    model, x = Forces(own=False).eval(), torch.randn(8, 16)
    expected = model(x)
    kpt.optimize(model, x, plugins=[plugin(DirectScale)], budget=20.0, cache=False)
    assert "with torch.enable_grad()" in kpt.report(model).reason
    assert torch.equal(model(x), expected)
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        kpt.optimize(model, x, plugins=[plugin(DirectScale)], budget=20.0, cache=False)


def test_a_forward_that_takes_a_gradient_by_itself_is_optimised() -> None:
    model, x = Forces(own=True).eval(), torch.randn(8, 16)
    expected = model(x)
    optimized(model, x, plugins=[plugin(DirectScale)], budget=20.0)
    torch.testing.assert_close(model(x), expected)
    assert fast_calls(model) == 1
