"""Configurations and attributes that passes change, and constants that change under a plan."""

from __future__ import annotations

import pytest
import torch

import kpt
import subtle_passes as subtle
from fingerprints import fallbacks, fast_calls, optimized
from slow_models import DirectScale, fast_forward, net, plugin
from subtle_passes import rule_of


def test_a_configuration_that_a_pass_changes_is_put_back():
    model, x = subtle.Configured().eval(), torch.randn(32, 16)
    assert rule_of(model, subtle.EditsConfig, x) == "parameter-modified"
    assert "model.settings: attribute 'fused' added" in kpt.report(model).rejected[0].reason
    assert vars(model.settings) == {"gain": 2.0, "inner": model.settings.inner}
    assert vars(model.settings.inner) == {"names": ["a"], "flag": True}


def test_a_constant_of_an_object_that_changes_is_no_constant_of_the_plan():
    model, x = subtle.Configured().eval(), torch.randn(32, 16)
    optimized(model, x, plugins=[plugin(subtle.Captured, phase="compile")])
    model.settings.gain = 3.0
    with torch.no_grad():
        assert torch.equal(model(x), fast_forward(model.slow, x) * 3.0)
        assert fast_calls(model) == 0
        model.settings.gain = 2.0
        assert torch.equal(model(x), fast_forward(model.slow, x) * 2.0)
    assert fast_calls(model) == 1


def test_an_attribute_that_only_a_function_reads_is_watched():
    model, x = subtle.ScaledByAFunction().eval(), torch.randn(32, 16)
    optimized(model, x, plugins=[plugin(subtle.Captured, phase="compile")])
    with torch.no_grad():
        model(x)
        model.gain = 3.0
        assert torch.equal(model(x), fast_forward(model.slow, x) * 3.0)
        assert fallbacks(model) == {"the attribute 'gain' of the model changed": 1}
        model.gain = 2.0
        model(x)
    assert fast_calls(model) == 2


def test_reading_attributes_brings_no_comparison():
    model = optimized(subtle.ScaledByAFunction().eval(), torch.randn(32, 16), plugins=[plugin(DirectScale)])
    structure = kpt.transaction.dispatch.plan_of(model).watch.structure
    structure.changed()
    assert model.gain == 2.0 and model.slow.weight is not None and not hasattr(model, "absent")
    assert not structure.unsure
    model.gain = 2.0
    assert structure.unsure


def test_what_torch_and_kpt_keep_in_a_module_is_no_configuration():
    model = optimized(net(), torch.randn(32, 16), plugins=[plugin(DirectScale)])
    watch = kpt.transaction.dispatch.plan_of(model).watch
    assert all(any(state is vars(m) for m in model.modules()) for state in watch._states)


def test_what_eager_itself_counts_is_blamed_on_nobody_and_put_back():
    model, x = subtle.CountsInAnObject().eval(), torch.randn(32, 16)
    optimized(model, x, plugins=[plugin(DirectScale)])
    assert kpt.report(model).notes == []


def test_what_is_kept_in_slots_is_put_back():
    model, x = subtle.Slotted().eval(), torch.randn(32, 16)
    assert rule_of(model, subtle.EditsSlots, x) == "parameter-modified"
    assert "model.settings: attribute '_SlottedConfig__gain' replaced" in kpt.report(model).rejected[0].reason
    assert (model.settings.gain, model.settings.names, model.settings.calls) == (2.0, ["a"], 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "factor", 4.0),
        lambda m: setattr(m, "factor", -0.0),
        lambda m: setattr(m, "factor", 0),
        lambda m: m.settings.amplify(3.0),
    ],
    ids=["of the module", "its sign", "its type", "private, of an object"],
)
def test_a_constant_in_a_slot_that_changes_is_no_constant_of_the_plan(change):
    model, x = subtle.Slotted().eval(), torch.randn(32, 16)
    optimized(model, x, plugins=[plugin(DirectScale)])
    with torch.no_grad():
        model(x)
        assert fast_calls(model) == 1
        change(model)
        result = model(x)
        assert fast_calls(model) == 1
        kpt.restore(model)
        assert torch.equal(result, model(x))
