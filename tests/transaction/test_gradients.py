"""Gradients through an optimised model, and calls in inference mode: those of eager, or eager's own call."""

from __future__ import annotations

import copy

import pytest
import torch

import kpt
from fingerprints import fallbacks, fast_calls, optimized
from planned import eager, plans, ready, trains
from slow_models import DirectScale, SlowScale, net, plugin
from subtle_passes import Captured


@plans
def test_inference_mode_and_then_training(plan):
    model, example = ready(plan)
    with torch.inference_mode():
        assert torch.equal(model(example), eager(model)(example))
    assert fast_calls(model) == 1
    trains(model.train(), example)
    model.eval()
    with torch.inference_mode():
        assert torch.equal(model(example), eager(model)(example))


@plans
def test_gradients_through_a_model_optimised_for_inference(plan):
    model, example = ready(plan)
    twin = eager(model)
    mine, theirs = example.clone().requires_grad_(), example.clone().requires_grad_()
    model(mine).square().sum().backward()
    twin(theirs).square().sum().backward()
    assert fast_calls(model) == 1
    torch.testing.assert_close(mine.grad, theirs.grad)
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize("made_inside", [True, False], ids=["inference tensors", "ordinary tensors"])
@pytest.mark.parametrize("optimised_inside", [True, False], ids=["optimised inside", "optimised outside"])
def test_compiled_code_serves_calls_in_inference_mode(optimised_inside, made_inside):
    model = net()
    twin = copy.deepcopy(model)
    with torch.inference_mode(optimised_inside):
        optimized(model, torch.randn(32, 16), plugins=[plugin(Captured)])
    with torch.inference_mode(made_inside):
        examples = [torch.randn(32, 16) for _ in range(3)]
    with torch.inference_mode():
        for example in examples:
            found, expected = model(example), twin(example)
            torch.testing.assert_close(found, expected)
            assert found.is_inference()
    assert fast_calls(model) == 3 and not fallbacks(model)
    with torch.no_grad():
        torch.testing.assert_close(model(examples[0]), twin(examples[0]))
    assert fast_calls(model) == 4 and not fallbacks(model)


def test_compiled_code_serves_inputs_that_require_a_gradient():
    model, example = net(), torch.randn(32, 16)
    twin = copy.deepcopy(model.eval())
    optimized(model, example, plugins=[plugin(Captured)])
    mine, theirs = example.clone().requires_grad_(), example.clone().requires_grad_()
    model(mine).square().sum().backward()
    twin(theirs).square().sum().backward()
    assert fast_calls(model) == 1 and not fallbacks(model)
    torch.testing.assert_close(mine.grad, theirs.grad)


class PartlyDetached(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        result = self.net(x)
        return {"result": result, "scores": result.detach() * 2.0, "scaled": x * 2.0}


class WithoutGradients(PartlyDetached):
    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return super().forward(x)


@pytest.mark.parametrize("cls", [PartlyDetached, WithoutGradients])
@pytest.mark.parametrize("input_requires", [False, True])
def test_outputs_carry_gradients_where_eagers_do(cls, input_requires):
    torch.manual_seed(0)
    model, x = cls().eval(), torch.randn(32, 16)
    twin = copy.deepcopy(model)
    optimized(model, x, plugins=[plugin(DirectScale)])
    given = [x.clone().requires_grad_(input_requires) for _ in range(2)]
    mine, theirs = model(given[0]), twin(given[1])
    assert fast_calls(model) == 1
    assert {k: t.requires_grad for k, t in mine.items()} == {k: t.requires_grad for k, t in theirs.items()}
    if cls is PartlyDetached:
        mine["result"].sum().backward()
        theirs["result"].sum().backward()
        assert all(torch.allclose(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters()))


class Samples(torch.nn.Module):
    """Adds noise of the size that its net says, as a variational autoencoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.net(x)
        return y + torch.randn_like(y) * y.tanh()


class Accumulates(Samples):
    """Scales by a running mean, which every call moves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.net(x)
        self.mean.mul_(0.9).add_(0.1 * y.mean(0).detach())
        return y * (self.mean + 1.0)


class WritesToItsInput(Samples):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x.add_(1.0))


@pytest.mark.parametrize(
    ("cls", "what"),
    [
        (Samples, "draws random numbers"),
        (Accumulates, "writes to the buffer mean"),
        (WritesToItsInput, "writes to its inputs"),
    ],
)
def test_a_call_that_cannot_be_repeated_is_eagers_where_gradients_are_on(cls, what):
    torch.manual_seed(0)
    model, x = cls().eval(), torch.randn(32, 16)
    twin = copy.deepcopy(model)
    optimized(model, x, plugins=[plugin(DirectScale)])
    for each in (model, twin):
        torch.manual_seed(3)
        each(x.clone()).square().sum().backward()
    after = torch.get_rng_state()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)
    for name, buffer in twin.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer)
    assert fallbacks(model) == {f"a gradient may be asked for, and the forward {what}": 1}
    results = []
    for each in (model, twin):
        torch.manual_seed(3)
        with torch.no_grad():
            results.append(each(x.clone()))
    torch.testing.assert_close(*results)
    assert torch.equal(torch.get_rng_state(), after) and fast_calls(model) == 1


class AsksForGradients(Samples):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) * (2 if x.requires_grad else 1)


class OneOrTwo(Samples):
    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.net(q) * (2 if q is k else 1) + k, q


@pytest.mark.parametrize("chosen", [DirectScale, Captured])
@pytest.mark.parametrize("grad", [False, True])
def test_a_forward_that_asks_whether_its_input_requires_a_gradient(chosen, grad):
    torch.manual_seed(0)
    model, x = AsksForGradients().eval(), torch.randn(32, 16)
    twin = copy.deepcopy(model)
    optimized(model, x, plugins=[plugin(chosen)])
    for requires in (False, True):
        given = [x.clone().requires_grad_(requires) for _ in range(2)]
        with torch.set_grad_enabled(grad):
            mine, true = model(given[0]), twin(given[1])
        torch.testing.assert_close(mine, true)
        if grad and requires:
            mine.sum().backward(), true.sum().backward()
            torch.testing.assert_close(given[0].grad, given[1].grad)


@pytest.mark.parametrize("chosen", [DirectScale, Captured])
def test_one_tensor_that_requires_a_gradient_and_is_passed_twice_stays_one(chosen):
    torch.manual_seed(0)
    model, x = OneOrTwo().eval(), torch.randn(32, 16)
    model.net.last = torch.nn.Linear(16, 16)
    twin = copy.deepcopy(model)
    optimized(model, (x, x), plugins=[plugin(chosen)])
    given = [torch.randn(32, 16, requires_grad=True)]
    given.append(given[0].detach().clone().requires_grad_())
    for each, tensor in zip((model, twin), given):
        result, same = each(tensor, tensor)
        (result.sum() + same.sum()).backward()
    torch.testing.assert_close(model(given[0], given[0])[0], twin(given[0], given[0])[0])
    torch.testing.assert_close(given[0].grad, given[1].grad)
    assert fast_calls(model) == 2 and not fallbacks(model)


def test_frozen_parameters_get_no_gradient():
    model, example = ready()
    model.requires_grad_(False)
    model.last.requires_grad_(True)
    model(example).sum().backward()
    assert model.slow.weight.grad is None and model.last.weight.grad is not None


def test_parameters_that_were_frozen_when_it_was_optimised_get_their_gradients():
    model, example = net(False).requires_grad_(False), torch.randn(32, 16)
    optimized(model, example, plugins=[plugin(DirectScale)])
    model.requires_grad_(True)
    model(example).sum().backward()
    plain = eager(model)
    plain(example).sum().backward()
    for mine, true in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, true.grad)


class WithBuffer(SlowScale):
    """The slow scale, with a buffer that each call multiplies by ``by``."""

    by = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.rand(16) + 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.factor.mul_(self.by)
        return super().forward(x)


class MovesALittle(DirectScale):
    """Computes the buffer anew as compiled code may: another last bit."""

    def replacement(self):
        def forward(self, x):
            self.factor.mul_(self.by * (1.0 + 2.0**-22))
            return x * self.weight + self.bias

        return forward


class LeavesIt(DirectScale):
    """Writes to no buffer."""


@pytest.mark.parametrize(
    ("by", "kind", "kept"),
    [(1.0, MovesALittle, True), (1.0, LeavesIt, True), (1.5, LeavesIt, False), (1.0001, LeavesIt, False)],
)
def test_a_buffer_that_moves_in_one_run_only_is_judged_by_its_value(by: float, kind: type, kept: bool):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), WithBuffer(), torch.nn.Linear(16, 1)).train()
    model[1].by = by
    kpt.optimize(model, torch.randn(32, 16), plugins=[plugin(kind)], budget=20, cache=False)
    receipt = kpt.report(model)
    assert (receipt.status == "optimized") == kept, (receipt.reason, receipt.rejected)
    if not kept:
        (entry,) = receipt.rejected
        assert entry.rule == "global-state" and "1.factor is a buffer that eager mode moves" in entry.reason
