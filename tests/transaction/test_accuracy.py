"""The user's own metric: it outranks the referee, its exceptions are the user's, it may do as it likes."""

from __future__ import annotations

import pytest
import torch

import fingerprints
import hostile_passes
import kpt
import slow_models
from fingerprints import optimized
from kpt.compiling import CompiledForward
from kpt.specs import Variant
from slow_models import DirectScale, net, plugin

PLUGINS = [plugin(DirectScale)]


def test_a_metric_that_holds():
    model, example = net(), torch.randn(32, 16)
    seen = []

    def metric(candidate: torch.nn.Module) -> float:
        seen.append(candidate)
        return float(candidate(example).mean())

    optimized(model, example, plugins=PLUGINS, accuracy=kpt.Accuracy(metric, max_drop=1e-3))
    receipt = kpt.report(model)
    assert receipt.accuracy["before"] == pytest.approx(receipt.accuracy["after"], abs=1e-5)
    assert all(candidate is not model for candidate in seen)


def test_a_metric_outranks_the_tolerances():
    model, example = net(), torch.randn(32, 16)
    offered = [plugin(hostile_passes.OnePercent)]
    kpt.optimize(model, example, plugins=offered, budget=20.0, cache=False)
    assert [entry.rule for entry in kpt.report(model).rejected] == ["value"]
    top = net()(example).argmax(-1)

    def agreement(candidate: torch.nn.Module) -> float:
        with torch.no_grad():
            return float((candidate(example).argmax(-1) == top).float().mean())

    optimized(model, example, plugins=offered, accuracy=kpt.Accuracy(agreement, max_drop=0.1))


class OneBufferOnePercent(hostile_passes.OneBuffer):
    def around(self, inner, model, x):
        return super().around(lambda given: inner(given) * 1.01, model, x)


class ReplaysOnePercent(hostile_passes.ReplaysLast):
    def around(self, inner, model, x):
        return super().around(lambda given: inner(given) * 1.01, model, x)


class RemembersByAddressOnePercent(hostile_passes.ReplaysLast):
    """What a later call writes into the same memory gets a copy of the old answer."""

    def around(self, inner, model, x):
        if x.data_ptr() not in self.last:
            self.last[x.data_ptr()] = x, inner(x).detach() * 1.01
        return self.last[x.data_ptr()][1].clone()


class ForgetsTheCount(hostile_passes.OneBuffer):
    """Wrong by a hundredth, and the buffer that each call of the model's moves stays as it is."""

    def around(self, inner, model, x):
        count = model.count.clone()
        output = inner(x) * 1.01
        model.count.copy_(count)
        return output


class CountsTwice(ForgetsTheCount):
    def around(self, inner, model, x):
        model.count += 1
        return inner(x) * 1.01


class WritesNan(ForgetsTheCount):
    def around(self, inner, model, x):
        output = inner(x) * 1.01
        model.sums.fill_(float("nan"))
        return output


class NanBesideOtherChoices(hostile_passes.OneBuffer):
    """Other choices, which the metric allows, and NaN in what comes after them."""

    def around(self, inner, model, x):
        choices, scores = inner(x)
        return 3 - choices, scores.masked_fill(scores > 0, float("nan"))


class TransposedOnePercent(hostile_passes.OneBuffer):
    def around(self, inner, model, x):
        return (inner(x) * 1.01).t().contiguous().t()


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        (OneBufferOnePercent, "replay"),
        (ReplaysOnePercent, "replay"),
        (RemembersByAddressOnePercent, "replay"),
        (TransposedOnePercent, "stride"),
    ],
)
def test_a_metric_outranks_nothing_else(wrong, rule):
    """What its tolerance was missed by had excused whatever came after."""
    model, example = net(), torch.randn(32, 16)
    top = net()(example).argmax(-1)

    def agreement(candidate: torch.nn.Module) -> float:
        with torch.no_grad():
            return float((candidate(example).argmax(-1) == top).float().mean())

    accuracy = kpt.Accuracy(agreement, max_drop=0.1)
    kpt.optimize(model, example, plugins=[plugin(wrong)], budget=20.0, cache=False, accuracy=accuracy)
    receipt = kpt.report(model)
    assert not receipt.optimized and [entry.rule for entry in receipt.rejected] == [rule]


class Counting(torch.nn.Module):
    """Counts its calls in a buffer, and sums its inputs in another."""

    def __init__(self):
        super().__init__()
        self.net = net()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("sums", torch.zeros(16))

    def forward(self, x):
        self.count += 1
        self.sums += x.sum(0)
        return self.net(x)


class Choosing(torch.nn.Module):
    """Choices, then the scores that they are made by."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        scores = self.net(x)
        return scores.argmax(-1), scores


@pytest.mark.parametrize(
    ("kind", "wrong", "rule"),
    [
        (Counting, ForgetsTheCount, "global-state"),
        (Counting, CountsTwice, "global-state"),
        (Counting, WritesNan, "nan"),
        (Choosing, NanBesideOtherChoices, "nan"),
    ],
)
def test_a_metric_outranks_neither_state_nor_nan(kind, wrong, rule):
    model, example = kind().eval(), torch.randn(32, 16)
    accuracy = kpt.Accuracy(lambda model: 1.0, max_drop=0.0)
    kpt.optimize(model, example, plugins=[plugin(wrong)], budget=20.0, cache=False, accuracy=accuracy)
    receipt = kpt.report(model)
    assert not receipt.optimized and [entry.rule for entry in receipt.rejected] == [rule], receipt.rejected


@pytest.mark.parametrize("higher", [True, False])
def test_a_drop_rejects(higher):
    values = iter([0.9, 0.8] if higher else [0.1, 0.2])
    model, example = net(), torch.randn(32, 16)
    before = fingerprints.of_model(model)
    accuracy = kpt.Accuracy(lambda candidate: next(values), max_drop=0.05, higher_is_better=higher)
    kpt.optimize(model, example, plugins=PLUGINS, budget=20.0, cache=False, accuracy=accuracy)
    (entry,) = kpt.report(model).rejected
    assert entry.rule == "accuracy" and "0.05" in entry.reason
    assert entry.figures["accuracy_drop"] == pytest.approx(0.1)
    assert fingerprints.differences(before, fingerprints.of_model(model)) == []


@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), SystemExit(7), KeyboardInterrupt()])
def test_an_exception_in_the_metric_is_the_users(error):
    model, example = net(), torch.randn(32, 16)
    before, process = fingerprints.of_model(model), fingerprints.of_process()

    def metric(candidate: torch.nn.Module) -> float:
        raise error

    with pytest.raises(type(error)) as found:
        kpt.optimize(model, example, plugins=PLUGINS, budget=20.0, cache=False, accuracy=kpt.Accuracy(metric))
    assert found.value is error
    assert fingerprints.differences(before, fingerprints.of_model(model)) == []
    assert fingerprints.differences(process, fingerprints.of_process()) == []
    assert fingerprints.ours(model) == []
    optimized(model, example, plugins=PLUGINS)


def test_a_metric_that_changes_modes_gradients_and_random_states():
    """It may evaluate and even train what it is given; the user's model stays as it was."""
    model, example = net(training=True), torch.randn(32, 16)
    before, process = fingerprints.of_model(model), fingerprints.of_process()

    def metric(candidate: torch.nn.Module) -> float:
        candidate.eval()
        torch.manual_seed(3)
        value = float(candidate(example).detach().mean() * 0)
        candidate.train()(torch.randn(64, 16) * 100.0)
        candidate(example).sum().backward()
        candidate.eval()
        return value

    optimized(model, example, plugins=PLUGINS, accuracy=kpt.Accuracy(metric, max_drop=0.1))
    assert fingerprints.differences(process, fingerprints.of_process()) == []
    assert kpt.report(model).mode == "training"
    twin = net(training=True)
    assert torch.allclose(model(example), twin(example), atol=1e-5)
    assert fingerprints.fast_calls(model) == 1
    assert torch.allclose(model.norm.running_mean, twin.norm.running_mean, atol=1e-6)
    kpt.restore(model)
    model.norm.load_state_dict(net(training=True).norm.state_dict())
    assert fingerprints.differences(before, fingerprints.of_model(model)) == []


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"metric": 3}, TypeError, "got int"),
        ({"metric": print, "max_drop": -1.0}, ValueError, "max_drop"),
        ({"metric": print, "max_drop": float("nan")}, ValueError, "max_drop"),
        ({"metric": print, "max_drop": "little"}, TypeError, "max_drop='little'"),
    ],
)
def test_a_bad_accuracy_is_refused(arguments, error, text):
    with pytest.raises(error, match=text):
        kpt.Accuracy(**arguments)


def test_metrics_that_cannot_be_compared_are_a_drop():
    accuracy, nan, infinite = kpt.Accuracy(float, max_drop=1.0), float("nan"), float("inf")
    assert accuracy.drop(0.5, nan) == accuracy.drop(nan, 0.5) == accuracy.drop(nan, nan) == infinite
    assert accuracy.drop(infinite, infinite) == 0.0


def test_a_metric_that_returns_no_number():
    model = net()
    with pytest.raises(TypeError, match="returned str"):
        kpt.optimize(
            model, torch.randn(32, 16), plugins=PLUGINS, accuracy=kpt.Accuracy(lambda candidate: "good")
        )
    assert fingerprints.ours(model) == []


def test_a_metric_that_is_nan_for_the_untouched_model_is_an_error_and_not_a_drop_of_every_plan():
    model = net()
    before = fingerprints.of_model(model)
    with pytest.raises(ValueError, match="NaN for the untouched model"):
        kpt.optimize(
            model,
            torch.randn(32, 16),
            plugins=PLUGINS,
            budget=20.0,
            cache=False,
            accuracy=kpt.Accuracy(lambda candidate: float("nan")),
        )
    assert fingerprints.differences(before, fingerprints.of_model(model)) == []
    assert fingerprints.ours(model) == []


class CompiledDirect(DirectScale):
    """The whole model compiled without a compiler, as a plan for training."""

    variant = Variant("compiled", predicted_gain=5.0, sites=())

    def apply(self, model, variant):
        undo = super().apply(model, variant)
        model.forward = self.compiled = CompiledForward(model.forward, backend="aot_eager")

        def undo_both():
            del model.__dict__["forward"]
            undo()

        return undo_both

    def verify_applied(self, model):
        return self.compiled.executions > 0


slow_models.CompiledDirect = CompiledDirect
CompiledDirect.__module__ = "slow_models"


def slow_net():
    """So slow that no compiled code loses against it."""
    model = net(training=True)
    model.slow.rounds = 400
    return model


def evaluates(candidate, example):
    candidate.eval()
    return candidate(example)


def evaluates_and_trains(candidate, example):
    evaluates(candidate, example)
    candidate.train()(example).sum().backward()
    with torch.no_grad():
        return candidate(example)


def freezes_a_part(candidate, example):
    candidate.norm.eval()
    return candidate(example)


def changes_the_structure(candidate, example):
    candidate.norm = torch.nn.Identity()
    candidate.first.forward = lambda x: x
    candidate.register_forward_hook(lambda module, args, output: output * 2)
    return candidate(example)


@pytest.mark.parametrize(
    "use", [evaluates, evaluates_and_trains, freezes_a_part, changes_the_structure], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("offered", [DirectScale, CompiledDirect], ids=["direct", "compiled"])
def test_a_metric_that_switches_modes_of_a_plan_for_training_sees_what_eager_gives(use, offered):
    """And neither the plan, the baseline nor the user's model is in another mode afterwards."""
    model, example = slow_net(), torch.randn(32, 16)
    before = fingerprints.of_model(model)
    expected = use(slow_net(), example).detach()
    measured = []

    def metric(candidate):
        output = use(candidate, example).detach()
        measured.append(output)
        return -float((output - expected).abs().max())

    accuracy = kpt.Accuracy(metric, max_drop=1e-4)
    optimized(model, example, plugins=[plugin(offered)], accuracy=accuracy, budget=30.0)
    receipt = kpt.report(model)
    assert len(measured) >= 2 and receipt.mode == "training"
    for output in measured:
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert all(module.training for module in model.modules())
    twin = net(training=True)
    torch.testing.assert_close(model(example), twin(example), rtol=1e-4, atol=1e-5)
    assert fingerprints.fast_calls(model) == 1
    kpt.restore(model)
    model.norm.load_state_dict(net(training=True).norm.state_dict())
    assert fingerprints.differences(before, fingerprints.of_model(model)) == []


def test_a_copy_that_the_metric_keeps_runs_the_original_forward():
    model, example, kept = net(), torch.randn(32, 16), []

    def metric(candidate):
        kept.append(candidate)
        return 1.0

    optimized(model, example, plugins=PLUGINS, accuracy=kpt.Accuracy(metric))
    kpt.restore(model)
    for candidate in kept:
        assert torch.equal(candidate(example), net()(example))
        assert fingerprints.ours(candidate) == []


def test_the_users_metric_outranks_the_tolerance():
    x = torch.randn(8, 16)
    loose = kpt.Accuracy(lambda model: 1.0, max_drop=0.0)
    for accuracy, kept in ((None, False), (loose, True)):
        model, offered = net(), [plugin(hostile_passes.OnePercent)]
        kpt.optimize(model, x, plugins=offered, accuracy=accuracy, budget=20, cache=False)
        assert kpt.report(model).optimized is kept, kpt.report(model)
