"""The user's own metric: it outranks the referee, its exceptions are the user's, it may do as it likes."""

from __future__ import annotations

import pytest
import torch

import fingerprints
import hostile_passes
import kpt
from fingerprints import optimized
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
    ],
)
def test_a_bad_accuracy_is_refused(arguments, error, text):
    with pytest.raises(error, match=text):
        kpt.Accuracy(**arguments)


def test_a_metric_that_returns_no_number():
    model = net()
    with pytest.raises(TypeError, match="returned str"):
        kpt.optimize(
            model, torch.randn(32, 16), plugins=PLUGINS, accuracy=kpt.Accuracy(lambda candidate: "good")
        )
    assert fingerprints.ours(model) == []
