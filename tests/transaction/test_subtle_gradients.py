"""Passes that are wrong only in gradients, and hooks that see them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.modules import module as torch_module

import fingerprints
import kpt
import subtle_passes as subtle
from fingerprints import fallbacks, fast_calls, optimized
from kpt.transaction.commit import Committed
from slow_models import DirectScale, net, plugin
from subtle_passes import rule_of


def test_the_gradient_of_an_input_is_judged():
    example = torch.randn(32, 16).requires_grad_()
    assert rule_of(net(training=True), subtle.LosesInputGradient, example) == "gradient"
    model = optimized(net(training=True), example, plugins=[plugin(DirectScale)])
    x = torch.randn(32, 16).requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None and fast_calls(model) == 1


def test_an_input_whose_gradient_was_not_judged_is_not_served_in_training():
    model = optimized(net(training=True), torch.randn(32, 16), plugins=[plugin(subtle.LosesInputGradient)])
    x = torch.randn(32, 16).requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None and fast_calls(model) == 0
    assert fallbacks(model) == {"'x' requires a gradient; proven without": 1}


def test_outputs_beside_the_loss_keep_their_gradients():
    example = torch.randn(32, 16)
    assert rule_of(subtle.WithLoss().train(), subtle.DetachesLogits, example) == "gradient"
    assert rule_of(subtle.WithLoss().train(), DirectScale, example) == "kept"


@pytest.mark.parametrize("training", [False, True])
def test_models_with_complex_weights_are_optimised(training):
    example = torch.randn(32, 16, dtype=torch.complex64)
    assert rule_of(subtle.ComplexSlow().train(training), DirectScale, example) == "kept"
    assert rule_of(subtle.ComplexSlow().train(training), subtle.ThirtyPercent, example) in (
        "value",
        "gradient",
    )


def test_a_backward_after_a_switch_of_the_mode_is_that_of_the_forward():
    model, x = net(dropout=0.5), torch.randn(32, 16)
    expected = torch.autograd.grad(model(x).sum(), model.first.weight)[0]
    optimized(model, torch.randn(32, 16), plugins=[plugin(DirectScale)])
    output, statistics = model(x), model.norm.running_mean.clone()
    assert fast_calls(model) == 1
    model.train()
    torch.testing.assert_close(torch.autograd.grad(output.sum(), model.first.weight)[0], expected)
    assert all(module.training for module in model.modules())
    assert torch.equal(model.norm.running_mean, statistics)


def test_a_backward_after_weights_were_exchanged_says_so():
    model = optimized(net(), torch.randn(32, 16), plugins=[plugin(DirectScale)])
    output, weight = model(torch.randn(32, 16)), model.first.weight
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match="replaced since the forward"):
        torch.autograd.grad(output.sum(), weight)


def test_hooks_of_parameters_do_not_fire_in_a_run_and_fire_after_it():
    model, fired = net(training=True), []
    handle = model.first.weight.register_hook(lambda grad: fired.append("hook"))
    model.first.bias.register_post_accumulate_grad_hook(lambda parameter: fired.append("accumulated"))
    optimized(model, torch.randn(32, 16), plugins=[plugin(DirectScale)])
    assert fired == []
    model(torch.randn(32, 16)).sum().backward()
    assert sorted(fired) == ["accumulated", "hook"]
    assert fast_calls(model) == 1
    handle.remove()
    model(torch.randn(32, 16)).sum().backward()
    assert fired.count("hook") == 1


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_hooks_of_all_modules_see_every_module(kind):
    fired = []
    register = getattr(torch_module, f"register_module_{kind}")
    x, model = torch.randn(32, 16), net(training=True)
    optimized(model, x, plugins=[plugin(DirectScale)])
    with register(lambda module, *rest: fired.append(type(module).__name__)):
        model(x).sum().backward()
        assert "Linear" in fired and fast_calls(model) == 0
        fired.clear()
        kpt.optimize(model, x, plugins=[plugin(DirectScale)], cache=False)
        assert fired == []
        assert "global module hook" in kpt.report(model).reason


def test_a_plan_that_writes_to_weights_only_once_it_serves_is_taken_back(monkeypatch):
    time = Committed.time

    def serving(self, *args):
        monkeypatch.setattr(subtle.WritesLate, "serves", True)
        return time(self, *args)

    monkeypatch.setattr(Committed, "time", serving)
    model = net()
    before = fingerprints.of_model(model)
    assert rule_of(model, subtle.WritesLate, torch.randn(32, 16)) == "parameter-modified"
    assert fingerprints.differences(before, fingerprints.of_model(model)) == []
    assert fingerprints.ours(model) == []
