"""A committed plan through the life of a model: no stale weight, no wrong mode, no call that fails."""

from __future__ import annotations

import copy

import pytest
import torch

import kpt
from fingerprints import fallbacks, fast_calls, optimized
from planned import PLANS, agrees, eager, plans, ready, trains
from slow_models import DirectScale, Net, net, plugin


@plans
def test_evaluation_training_step_evaluation(plan):
    model, example = ready(plan)
    assert agrees(model, example) and fast_calls(model) == 1
    before = model(example).detach().clone()
    trains(model.train(), example)
    assert fallbacks(model)["the model is in training mode"] == 1
    model.eval()
    assert agrees(model, example)
    assert not torch.allclose(model(example), before)
    kpt.refresh(model)
    assert agrees(model, example) and fast_calls(model) == 1


def test_a_plan_that_reads_live_weights_stays_fast_after_a_training_step():
    model, example = ready("live")
    trains(model.train(), example)
    model.eval()
    assert agrees(model, example) and fast_calls(model) == 1


def test_a_plan_for_training_trains_as_eager_does():
    model, example = ready(training=True)
    twin = copy.deepcopy(eager(model))
    for _ in range(8):
        batch = torch.randn(32, 16)
        trains(model, batch)
        trains(twin, batch)
        for mine, theirs in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert fast_calls(model) == 8 and not fallbacks(model)
    model.eval()
    torch.testing.assert_close(model(example), twin.eval()(example), rtol=1e-5, atol=1e-6)
    assert fallbacks(model) == {"the model is in evaluation mode": 1}


def test_a_model_in_training_mode_without_gradients():
    """Monte-Carlo dropout, or a forgotten ``eval()``: inference, with running statistics that move."""
    model, twin, example = net(training=True), net(training=True), torch.randn(32, 16)
    with torch.no_grad():
        optimized(model, example, plugins=[plugin(DirectScale)])
        assert kpt.report(model).mode == "inference"
        torch.testing.assert_close(model(example), twin(example))
    assert fast_calls(model) == 1
    model(example).sum().backward()
    twin(example).sum().backward()
    assert fallbacks(model) == {"gradients are on in training mode": 1}
    assert torch.equal(model.norm.running_mean, twin.norm.running_mean)
    assert torch.equal(model.slow.weight.grad, twin.slow.weight.grad)
    model.eval()
    assert agrees(model, example) and fast_calls(model) == 1


@plans
@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(plan, assign):
    model, example = ready(plan)
    torch.manual_seed(9)
    other = Net().eval()
    model.load_state_dict(other.state_dict(), assign=assign)
    with torch.no_grad():
        assert torch.equal(model(example), other(example))
    kpt.refresh(model)
    with torch.no_grad():
        assert torch.equal(model(example), other(example))
    assert fast_calls(model) == 1


@plans
def test_weights_written_in_place(plan):
    model, example = ready(plan)
    with torch.no_grad():
        model.slow.weight.mul_(2.0)
        model.norm.running_mean.add_(1.0)
    assert agrees(model, example)
    if plan == "derived":
        assert "written in place" in next(iter(fallbacks(model)))


@plans
def test_a_weight_replaced_by_another(plan):
    model, example = ready(plan)
    model.slow.weight = torch.nn.Parameter(torch.ones(16))
    assert agrees(model, example)
    assert fast_calls(model) == 0 and fallbacks(model)


@plans
def test_a_write_without_a_trace_needs_refresh(plan):
    model, example = ready(plan)
    model.slow.weight.data.mul_(2.0)
    assert kpt.refresh(model) is model
    assert agrees(model, example) and fast_calls(model) == 1


@plans
def test_converted_to_another_dtype_and_back(plan):
    model, example = ready(plan)
    model.to(torch.float64)
    with torch.no_grad():
        assert torch.equal(model(example.double()), eager(model).double()(example.double()))
    model.to(torch.float32)
    assert agrees(model, example)
    assert fast_calls(model) == 0
    kpt.refresh(model)
    assert agrees(model, example) and fast_calls(model) == 1


@plans
def test_a_submodule_in_another_mode(plan):
    model, example = ready(plan)
    model.norm.train()
    twin = eager(model)
    twin.norm.train()
    assert torch.equal(model(example), twin(example))
    assert torch.equal(model.norm.running_mean, twin.norm.running_mean)
    model.norm.eval()
    assert agrees(model, example)


@plans
def test_an_attribute_of_a_submodule_edited(plan):
    model, example = ready(plan)
    model.norm.eps = 0.5
    twin = eager(model)
    twin.norm.eps = 0.5
    assert torch.equal(model(example), twin(example))
    model.norm.eps = 1e-5
    assert agrees(model, example)


def test_a_submodule_replaced():
    model, example = ready()
    model.last = torch.nn.Linear(16, 7)
    assert model(example).shape == (32, 7)


class Tied(torch.nn.Module):
    """Two layers that share one weight and one module that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        inner = net()
        self.first, self.again = inner.slow, inner.slow
        self.up, self.down = torch.nn.Linear(16, 16, bias=False), torch.nn.Linear(16, 16, bias=False)
        self.down.weight = self.up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.down(self.first(self.up(x))))


@plans
def test_shared_modules_and_tied_weights(plan):
    torch.manual_seed(0)
    model, example = Tied().eval(), torch.randn(32, 16)
    optimized(model, example, plugins=[plugin(PLANS[plan])])
    assert model.down.weight is model.up.weight and model.again is model.first
    twin = Tied().eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(model(example), twin(example)) and fast_calls(model) == 1
    with torch.no_grad():
        model.up.weight.mul_(2.0)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(model(example), twin(example))
