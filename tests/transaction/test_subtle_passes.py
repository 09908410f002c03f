"""Passes that are wrong only in random models, at a level, in copies, or in outputs that few look at."""

from __future__ import annotations

import pytest
import torch

import kpt
import subtle_passes as subtle
from fingerprints import fast_calls, optimized
from slow_models import DirectScale, SlowScale, net, plugin
from subtle_passes import rule_of


@pytest.mark.parametrize("training", [False, True])
def test_a_model_that_adds_noise_is_no_licence_to_be_wrong(training):
    """In fp64 it draws other noise; a reference so far from eager would allow anything."""
    example = torch.randn(32, 16)
    assert rule_of(subtle.NoisySlow().train(training), subtle.ThirtyPercent, example) == "value"
    model = optimized(subtle.NoisySlow().train(training), example, plugins=[plugin(DirectScale)])
    assert "random numbers" in kpt.report(model).baseline["note"]
    assert kpt.report(model).baseline["reference_dtype"] == "float32"


def test_noise_of_python_and_numpy_is_the_same_for_all():
    example = torch.randn(32, 16)
    assert rule_of(subtle.PythonsNoise().eval(), subtle.ThirtyPercent, example) == "value"
    assert rule_of(subtle.PythonsNoise().eval(), DirectScale, example) == "kept"


def test_a_model_that_is_another_in_fp64_is_judged_against_itself():
    example, model = torch.randn(32, 16), subtle.AsksForItsDtype().eval()
    assert rule_of(model, subtle.ThirtyPercent, example) == "value"
    assert rule_of(model, DirectScale, example) == "kept"
    assert "something else in fp64 (output is off by 50%)" in kpt.report(model).baseline["note"]


def test_what_quantises_is_no_step_of_level_production():
    model, x = SlowScale().eval(), torch.randn(32, 16)
    offered = [plugin(subtle.FourPercentInFp8, level="production")]
    kpt.optimize(model, x, plugins=offered, budget=20.0, cache=False)
    assert kpt.report(model).skipped[0]["reason"] == "needs level='aggressive'"
    optimized(model, x, plugins=offered, level="aggressive")


@pytest.mark.parametrize("offered", [subtle.SaysNothingOfCopies, subtle.HidesCopies, subtle.CopiesInArrays])
def test_copies_of_weights_are_watched_though_nobody_was_told(offered):
    model, x = net(), torch.randn(32, 16)
    optimized(model, x, plugins=[plugin(offered)])
    assert kpt.report(model).watched_tensors > 0
    with torch.no_grad():
        model(x)
        model.slow.weight.mul_(2.0)
        result = model(x)
        assert fast_calls(model) == 1
        kpt.restore(model)
        assert torch.equal(result, model(x))


@pytest.mark.parametrize("offered", [DirectScale, subtle.LiveArrays])
def test_an_honest_plan_without_copies_watches_no_weights(offered):
    model = optimized(net(), torch.randn(32, 16), plugins=[plugin(offered)])
    assert kpt.report(model).watched_tensors == 0


@pytest.mark.parametrize("offered", [subtle.Remembers, subtle.RemembersMemory])
def test_results_that_are_remembered_by_tensor_or_memory_are_a_replay(offered):
    model = net()
    assert rule_of(model, offered, torch.randn(32, 16)) == "replay"
    assert "same tensors with new values" in kpt.report(model).rejected[0].reason


class WritesItsList(torch.nn.Module):
    """Appends to a list that it is given, or puts another tensor there."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.slow, self.way = SlowScale(16), way

    def forward(self, x: torch.Tensor, states: list[torch.Tensor]) -> torch.Tensor:
        if self.way == "append":
            states.append(states[0] + 1.0)
        else:
            states[0] = states[0] + 1.0
        return self.slow(x) + states[-1]


@pytest.mark.parametrize("way", ["append", "exchange"])
def test_a_model_that_changes_a_list_it_is_given_is_no_replay(way):
    given = (torch.randn(32, 16), [torch.randn(16)])
    optimized(WritesItsList(way).eval(), given, plugins=[plugin(DirectScale)])
    assert len(given[1]) == 1
    assert rule_of(WritesItsList(way).eval(), subtle.ThirtyPercent, *given) == "value"


@pytest.mark.parametrize("way", ["an array", "a number of NumPy's", "an object"])
def test_outputs_that_are_no_tensors_are_judged(way):
    model = subtle.Handover(way).eval()
    assert rule_of(model, subtle.ThirtyPercent, torch.randn(32, 16)) == "value"
    optimized(model, torch.randn(32, 16), plugins=[plugin(DirectScale)])


@pytest.mark.parametrize("way", ["a generator", "a coroutine"])
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_what_is_computed_after_the_call_is_left_alone(way):
    model = kpt.optimize(subtle.Handover(way).eval(), torch.randn(32, 16), plugins=[plugin(DirectScale)])
    assert "is computed after the call" in kpt.report(model).reason


@pytest.mark.parametrize("scale", [(1.0, 1.0), (1.0, 2.0)])
def test_calls_that_differ_in_more_than_values_are_not_mixed(scale):
    x = torch.randn(32, 16)
    masks = (None, torch.rand(16))
    calls = [{"x": x + n, "mask": masks[n], "scale": scale[n]} for n in range(2)]
    model = subtle.Masked().eval()
    kpt.optimize(model, calls, plugins=[plugin(DirectScale)], budget=20.0, cache=False)
    assert kpt.report(model).optimized, [entry.reason for entry in kpt.report(model).rejected]


@pytest.mark.parametrize(
    ("offered", "rule", "text"),
    [
        (subtle.RingOfBuffers, "replay", "output is held after the call"),
        (subtle.KeepsResults, "replay", "output is held after the call"),
        (subtle.ReturnsASubclass, "structure", "output is a OwnTensors"),
        (subtle.ReturnsInferenceTensors, "structure", "output was made in inference mode"),
        (subtle.KeepsHistory, "gradient", "output requires a gradient"),
    ],
)
def test_outputs_that_are_not_the_callers_own_are_rejected(offered, rule, text):
    model = net()
    assert rule_of(model, offered, torch.randn(32, 16)) == rule
    assert text in kpt.report(model).rejected[0].reason


def test_an_output_that_cannot_be_viewed_is_rejected():
    model, x = SlowScale().eval(), torch.randn(32, 16)
    assert rule_of(model, subtle.Transposes, x) == "stride"
    assert rule_of(subtle.Configured().eval(), DirectScale, x.t().contiguous().t()) == "kept"
