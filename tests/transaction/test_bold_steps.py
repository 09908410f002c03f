"""What a level permits beyond the others must not cost what the others would have gained."""

from __future__ import annotations

import torch

import kpt
import mixed_models
import slow_models
from fingerprints import optimized
from kpt.specs import PolicySpec


def test_a_bold_step_that_never_ends_leaves_the_cautious_plan():
    policies = [
        PolicySpec("Cautious", entry="bold_passes:Cautious", compute_dtype="bfloat16"),
        PolicySpec("Bold", entry="bold_passes:Bold", level="aggressive", compute_dtype="int8"),
    ]
    model, example = mixed_models.mixed(rounds=200), torch.randn(64, 64)
    offered = [slow_models.plugin(slow_models.DirectScale, policies=policies)]
    optimized(model, example, plugins=offered, level="aggressive", budget=12.0)
    receipt = kpt.report(model)
    assert "Cautious:half" in [entry.name for entry in receipt.accepted]
    (bold,) = [entry for entry in receipt.rejected if entry.name == "Bold:stuck"]
    assert bold.rule == "deadline"
