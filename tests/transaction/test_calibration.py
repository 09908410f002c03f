"""A variant that measures what flows through the model gets the examples, and changes nothing by it."""

from __future__ import annotations

import torch

import calibrating_passes
import kpt
import slow_models
from fingerprints import optimized


def test_a_pass_calibrates_on_the_first_examples():
    calibrating_passes.Calibrated.seen.clear()
    model = slow_models.net()
    examples = [torch.randn(rows, 16) for rows in (2, 3, 4, 5, 6, 7)]
    optimized(model, examples, plugins=[slow_models.plugin(calibrating_passes.Calibrated)])
    assert [entry.name for entry in kpt.report(model).accepted] == ["Calibrated:calibrated"]
    assert [rows for rows, _ in calibrating_passes.Calibrated.seen[:4]] == [2, 3, 4, 5]


def test_buffers_that_the_forward_moves_are_as_before():
    class Counting(slow_models.Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model = Counting().eval()
    optimized(model, torch.randn(4, 16), plugins=[slow_models.plugin(calibrating_passes.Calibrated)])
    assert [entry.name for entry in kpt.report(model).accepted] == ["Calibrated:calibrated"]
    assert model.calls == 0


def test_a_pass_that_fails_to_calibrate_is_named():
    model = slow_models.net()
    offered = [slow_models.plugin(calibrating_passes.FailingToCalibrate)]
    kpt.optimize(model, torch.randn(4, 16), plugins=offered, cache=False)
    (entry,) = kpt.report(model).rejected
    assert entry.rule == "failed" and "calibrate raised ValueError: no ranges" in entry.reason


def test_a_hook_that_is_left_behind_is_judged_with_the_plan_and_stays_out_of_the_model():
    model, x = slow_models.net(), torch.randn(4, 16)
    expected = model(x)
    kpt.optimize(model, x, plugins=[slow_models.plugin(calibrating_passes.LeavingItsHook)], cache=False)
    assert [entry.rule for entry in kpt.report(model).rejected] == ["value"]
    assert torch.equal(model(x), expected)
