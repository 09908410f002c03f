"""Optimising on the first real call: eager's own answer first, and never where a call cannot be observed."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fingerprints
import kpt
from fingerprints import fast_calls
from kpt.transaction import events
from slow_models import DirectScale, net, plugin


def deferred(**options: object) -> tuple[torch.nn.Module, torch.Tensor]:
    options = {"plugins": [plugin(DirectScale)], "budget": 20.0, "cache": False, **options}
    model = net()
    assert kpt.optimize(model, **options) is model
    assert kpt.report(model).mode == "deferred" and not kpt.report(model).optimized
    return model, torch.randn(32, 16)


def test_the_first_call_returns_eagers_own_output_and_then_the_model_is_optimised():
    model, example = deferred()
    given = example.clone()
    first = model(given)
    assert torch.equal(first, net()(example)) and first.requires_grad
    first.sum().backward()
    assert torch.equal(given, example)
    assert kpt.report(model).optimized and fast_calls(model) == 0
    with torch.no_grad():
        model(x=example)
    assert fast_calls(model) == 1


def test_under_inference_mode():
    model, example = deferred()
    with torch.inference_mode():
        first = model(torch.randn(32, 16))
        assert first.is_inference() and kpt.report(model).optimized
        assert torch.equal(model(example), net()(example))
    assert fast_calls(model) == 1
    model.train()(example).sum().backward()
    assert model.slow.weight.grad is not None


def test_training_is_observed():
    model, example = deferred()
    kpt.restore(model)
    kpt.optimize(model.train(), plugins=[plugin(DirectScale)], budget=20.0, cache=False)
    model(example).sum().backward()
    assert kpt.report(model).mode == "training" and kpt.report(model).optimized
    twin = net(training=True)
    twin(example).sum().backward()
    assert torch.equal(model.norm.running_mean, twin.norm.running_mean)
    torch.testing.assert_close(model.slow.weight.grad, twin.slow.weight.grad)


def test_not_while_something_traces_the_model():
    model, example = deferred()
    torch.compile(model, backend="eager", fullgraph=True)(example)
    torch.export.export(model, (example,))
    torch.jit.trace(model, example, check_trace=False)
    assert kpt.report(model).mode == "deferred"
    model(example)
    assert kpt.report(model).optimized


def test_not_while_a_checkpoint_recomputes():
    model, example = deferred()
    shown = []

    def forward(x):
        with events.listen(lambda event: shown.append(torch._C._current_graph_task_id())):
            return model(x)

    checkpoint(forward, example.requires_grad_(), use_reentrant=False).sum().backward()
    assert all(task == -1 for task in shown)
    assert torch.equal(model(example), net()(example))


def test_restore_and_copies_of_a_model_that_waits():
    import copy

    model, example = deferred()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(example), net()(example))
    kpt.restore(model)
    assert fingerprints.ours(model) == []
    assert torch.equal(model(example), net()(example))


def test_an_error_of_the_models_own_comes_through_and_the_next_call_is_observed():
    model, example = deferred()
    with pytest.raises(RuntimeError):
        model(torch.randn(32, 9))
    assert kpt.report(model).mode == "deferred"
    model(example)
    assert kpt.report(model).optimized


def test_many_threads_call_a_model_that_waits():
    model, example = deferred()
    expected, wrong = net()(example), []

    def work() -> None:
        for _ in range(5):
            with torch.no_grad():
                if not torch.equal(model(example), expected):
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert wrong == [] and kpt.report(model).optimized


def test_a_metric_that_calls_another_waiting_model():
    """A search inside a search: the inner model is answered and stays as it waits, or is optimised."""
    other, example = deferred()

    def metric(model: torch.nn.Module) -> float:
        return float(other(example).sum() * 0 + model(example).mean() * 0 + 1.0)

    model, _ = deferred(accuracy=kpt.Accuracy(metric, max_drop=0.5))
    model(example)
    assert kpt.report(model).optimized
    assert torch.equal(other(example), net()(example))
