"""Gradients of an optimised model where a parameter, an input or the output is not the usual one."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import kpt
from slow_models import DirectScale, SlowScale, net, plugin
from watched_models import optimised, reasons


def unfrozen_gradients(model: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a parameter that was frozen while the model was optimised: from it, and from an untouched copy."""
    model.first.weight.requires_grad_(False)
    plain = copy.deepcopy(model)
    optimised(model, x)
    for each in (model, plain):
        each.first.weight.requires_grad_(True)
        each(x).sum().backward()
    return model.first.weight.grad, plain.first.weight.grad


def test_an_unfrozen_parameter_gets_its_gradient():
    model = net(True)
    torch.testing.assert_close(*unfrozen_gradients(model, torch.randn(8, 16)))
    assert any("frozen" in reason for reason in reasons(model))


def test_an_unfrozen_parameter_gets_its_gradient_in_evaluation_mode_too():
    torch.testing.assert_close(*unfrozen_gradients(net(), torch.randn(8, 16)))


@dataclasses.dataclass
class Answer:
    scores: torch.Tensor
    note: str = "fine"


class Answering(SlowScale):
    def forward(self, x):
        return Answer(super().forward(x))


def test_gradients_flow_through_a_dataclass_and_to_the_second_order():
    torch.manual_seed(0)
    model, plain = torch.nn.Sequential(Answering(16)).eval(), torch.nn.Sequential(Answering(16)).eval()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(8, 16)

    class Direct(DirectScale):
        def replacement(self):
            return lambda self, x: Answer(x * self.weight + self.bias)

    import slow_models

    slow_models.Direct, Direct.__module__, Direct.__qualname__ = Direct, "slow_models", "Direct"
    kpt.optimize(model, x, plugins=[plugin(Direct)], budget=20, cache=False)
    assert kpt.report(model).optimized, kpt.report(model)
    found = []
    for candidate in (model, plain):
        given = x.clone().requires_grad_(True)
        (first,) = torch.autograd.grad(candidate(given).scores.pow(2).sum(), given, create_graph=True)
        first.pow(2).sum().backward()
        found.append((given.grad, candidate[0].weight.grad))
    for mine, true in zip(*found):
        torch.testing.assert_close(mine, true)


def test_an_input_written_to_before_the_backward_is_an_error_as_in_eager():
    model, x = optimised(net(), torch.randn(8, 16)), torch.randn(8, 16)
    loss = model(x).sum()
    x.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified"):
        loss.backward()


class Passing(SlowScale):
    def forward(self, x):
        return super().forward(x), x, self.weight


def test_a_parameter_or_an_input_that_is_an_output_stays_itself():
    torch.manual_seed(0)
    model, plain = torch.nn.Sequential(Passing(16)).eval(), torch.nn.Sequential(Passing(16)).eval()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(8, 16)

    class Direct(DirectScale):
        def replacement(self):
            return lambda self, x: (x * self.weight + self.bias, x, self.weight)

    import slow_models

    slow_models.Direct, Direct.__module__, Direct.__qualname__ = Direct, "slow_models", "Direct"
    kpt.optimize(model, x, plugins=[plugin(Direct)], budget=20, cache=False)
    assert kpt.report(model).optimized, kpt.report(model)
    found = []
    for candidate in (model, plain):
        given = x.clone().requires_grad_(True)
        computed, passed, weight = candidate(given)
        assert passed is given and weight is candidate[0].weight
        (computed.sum() + passed.pow(2).sum() + weight.pow(3).sum()).backward()
        found.append((given.grad, weight.grad))
    assert kpt.report(model).calls["optimized"] == 1
    for mine, true in zip(*found):
        torch.testing.assert_close(mine, true)
