"""A kernel's ``predict`` says what measured rates promise; the search follows it, and survives it."""

from __future__ import annotations

import pytest
import torch

import fingerprints
import kpt
import slow_kernels
from fingerprints import optimized
from kpt.specs import KernelSpec
from slow_models import plugin


def offered(predict: str) -> object:
    return plugin(
        kernels=[
            KernelSpec(
                op="rms_norm", name="right", entry="slow_kernels:right", predict=predict, predicted_gain=3.0
            )
        ]
    )


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return slow_kernels.NormNet().eval()


def test_what_is_predicted_is_tried():
    receipt = kpt.report(optimized(model(), torch.randn(64, 16), plugins=[offered("predictions:threefold")]))
    assert [entry.name for entry in receipt.accepted] == ["rms_norm/right"]


def test_what_is_predicted_to_lose_is_not_tried():
    receipt = kpt.report(
        kpt.optimize(
            model(), torch.randn(64, 16), plugins=[offered("predictions:half")], budget=20.0, cache=False
        )
    )
    assert [(entry.name, entry.rule) for entry in receipt.rejected] == [("rms_norm/right", "slower")]
    assert "predicted 0.50x" in receipt.rejected[0].reason and not receipt.optimized


@pytest.mark.parametrize(
    ("predict", "reason"),
    [
        ("predictions:raising", "predict raised LookupError: no table for this machine"),
        ("predictions:leaving", "predict raised SystemExit: 3"),
        ("predictions:words", "returned 'a lot'"),
        ("predictions:nothing", "returned nan"),
        ("predictions:missing", "missing"),
        ("no_such_module_here:predict", "no_such_module_here"),
    ],
)
def test_a_broken_prediction_loses_its_kernel_only(predict, reason):
    net = model()
    before = fingerprints.of_model(net)
    receipt = kpt.report(
        kpt.optimize(net, torch.randn(64, 16), plugins=[offered(predict)], budget=20.0, cache=False)
    )
    skipped = {skip["name"]: skip["reason"] for skip in receipt.skipped}
    assert reason in skipped["rms_norm/right"]
    assert fingerprints.differences(before, fingerprints.of_model(net)) == []
