"""Kernels at regions of a captured graph, in a plan with inductor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kpt import compiling
from kpt.graph_kernels import GraphKernelBehaviour
from kpt.specs import KernelSpec, Variant
from kpt_plugin_cpu import inductor

CALLS: list[tuple[int, ...]] = []


@torch.library.custom_op("kpt_cpu_tests::softmax", mutates_args=())
def _softmax(x: torch.Tensor, dim: int) -> torch.Tensor:
    CALLS.append(tuple(x.shape))
    return torch.softmax(x, dim)


@_softmax.register_fake
def _(x: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.dim = inputs[1]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    (y,) = ctx.saved_tensors
    return y * (grad - (grad * y).sum(ctx.dim, keepdim=True)), None


_softmax.register_autograd(_backward, setup_context=_setup)


def softmax(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    return _softmax(x, dim)  # type: ignore[no-any-return]


SPEC = KernelSpec("softmax", "counted", f"{__name__}:softmax", backward=True, compile_safe=True)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            y = layer(x)
            e = torch.exp(y - y.amax(-1, keepdim=True))
            x = x + e / e.sum(-1, keepdim=True)
        return x


@pytest.mark.skipif(inductor.compiler() is None, reason="no C++ compiler was found")
@pytest.mark.parametrize(
    ("training", "params"),
    [
        (False, {"freeze": False}),
        (False, {"freeze": True, "onednn": True}),
        (True, {"freeze": False}),
    ],
)
def test_inductor_compiles_the_graph_that_the_kernels_are_in(training: bool, params: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = Net().train(training), torch.randn(3, 8)
    expected = model(x)
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    kernel = GraphKernelBehaviour(SPEC, (), mode="training" if training else "inference")
    compiler = inductor.Inductor()
    with compiling.collect() as created:
        undos = [kernel.apply(model, Variant("counted")), compiler.apply(model, Variant("live", params))]
    assert created == [compiler.compiled]
    with torch.set_grad_enabled(training):
        model(x)
        CALLS.clear()
        found = model(x)
    assert CALLS == [(3, 8), (3, 8)]
    assert len(kernel.replaced) == 2 and kernel.verify_applied(model) and compiler.verify_applied(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    if training:
        mine = torch.autograd.grad(found.square().sum(), list(model.parameters()))
        torch.testing.assert_close(mine, gradients, rtol=1e-4, atol=1e-5)
    for undo in reversed(undos):
        undo()
    assert "forward" not in model.__dict__
    CALLS.clear()
    with torch.set_grad_enabled(training):
        assert torch.equal(model(x), expected) and not CALLS
