"""Hooks of torch's that compute a weight before each call: weight norm, spectral norm, pruning."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn.utils import prune

import kpt
from few_variants import Frozen
from fingerprints import fast_calls, optimized
from slow_models import DirectScale, SlowScale, plugin

COMPUTED = {
    "weight norm": torch.nn.utils.weight_norm,
    "spectral norm": torch.nn.utils.spectral_norm,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize(("step", "phase"), [(DirectScale, "layout"), (Frozen, "compile")])
@pytest.mark.parametrize("change", COMPUTED.values(), ids=COMPUTED)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_hooks_that_compute_a_weight_belong_to_the_model(change: Any, step: type, phase: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(change(torch.nn.Linear(16, 16)), SlowScale(16)).eval()
    x = torch.randn(8, 16)
    with torch.no_grad():
        model(x)  # torch copies no weight that was computed with gradients
    twin = copy.deepcopy(model)
    optimized(model, x, plugins=[plugin(step, phase=phase)], budget=60.0)
    close = {"atol": 1e-6, "rtol": 1e-5}
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin(x), **close)
        assert torch.equal(model(torch.stack([x, x])), twin(torch.stack([x, x])))  # by the original
        torch.testing.assert_close(model(x), twin(x), **close)
        assert fast_calls(model) == 2
        for each in (model, twin):
            for name, weight in each[0].named_parameters():
                weight.mul_(3.0 if name.endswith(("_g", "_orig")) else 1.0)
        torch.testing.assert_close(model(x), twin(x), **close)
        assert fast_calls(model) == 2 + (step is DirectScale)
    kpt.restore(model)
    assert list(model.state_dict()) == list(twin.state_dict()) and torch.equal(model(x), twin(x))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_training_moves_what_a_spectral_norm_counts_as_without_a_plan() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.utils.spectral_norm(torch.nn.Linear(16, 16)), SlowScale(16))
    twin, x = copy.deepcopy(model), torch.randn(8, 16)
    optimized(model, x, plugins=[plugin(DirectScale)], budget=20.0)
    for each in (model, twin):
        for _ in range(3):
            each(x).square().mean().backward()
    assert fast_calls(model) == 3
    for (name, mine), (_, theirs) in zip(model.named_buffers(), twin.named_buffers()):
        torch.testing.assert_close(mine, theirs, msg=name)
    for mine, theirs in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_whose_own_weight_a_hook_computes_comes_back_with_what_to_do() -> None:
    model, x = torch.nn.utils.weight_norm(torch.nn.Linear(16, 16)).eval(), torch.randn(8, 16)
    kpt.optimize(model, x, plugins=[plugin(DirectScale)], budget=5.0, cache=False)
    reason = kpt.report(model).reason
    assert "computes its weight" in reason and "Sequential(model)" in reason


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_hook_that_comes_later_beside_one_of_torchs_is_heard() -> None:
    torch.manual_seed(0)
    layer = torch.nn.utils.weight_norm(torch.nn.Linear(16, 16))
    model, x = torch.nn.Sequential(layer, SlowScale(16)).eval(), torch.randn(8, 16)
    optimized(model, x, plugins=[plugin(DirectScale)], budget=20.0)
    heard: list[int] = []
    with torch.no_grad():
        model(x)
        assert fast_calls(model) == 1
        handle = layer.register_forward_pre_hook(lambda *_: heard.append(1))
        model(x)
        assert heard == [1] and fast_calls(model) == 1
    handle.remove()
