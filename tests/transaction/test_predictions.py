"""A kernel's ``predict`` says what measured rates promise; the search follows it, and survives it."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

import fingerprints
import kpt
import predictions
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


class Clocked(torch.nn.Module):
    """One row takes a second of a hundred, as many as eight four of them."""

    now = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Clocked.now += 0.01 if len(x) == 1 else 0.04
        return self.linear(x)


def test_predictions_are_told_the_mean_of_all_kinds_of_calls(monkeypatch):
    """Of three singles and a batch no single call speaks for all, least of all the one that comes first."""
    from kpt.transaction import observe

    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: Clocked.now, monotonic=lambda: float(next(ticks)) * 1e-3)
    monkeypatch.setattr(observe, "time", clock)
    monkeypatch.setattr(predictions, "told", [])
    examples = [torch.randn(rows, 4) for rows in (1, 8, 1, 1)]
    listens = plugin(predictions.Listens)
    kpt.optimize(Clocked().eval(), examples, plugins=[listens], budget=20.0, cache=False)
    operations = 2 * 4 * 4 * (0.75 * 1 + 0.25 * 8)
    assert predictions.told == [(pytest.approx(0.75 * 0.01 + 0.25 * 0.04), operations)]
