"""The objective "throughput": what is kept is what gets more calls done, not what makes one call short."""

from __future__ import annotations

import threading
import time
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

import kpt
from fingerprints import ours
from kpt.judge.load import ONE_BY_ONE, Load
from kpt.specs import Variant
from slow_models import DirectScale, net, plugin

_ONE_AT_A_TIME = threading.Lock()


class Queueing(torch.nn.Module):
    """Calls wait for each other, and each takes 8 ms."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with _ONE_AT_A_TIME:
            time.sleep(0.008)
        return x * self.weight


def side_by_side(self: Queueing, x: torch.Tensor) -> torch.Tensor:
    time.sleep(0.011)
    return x * self.weight


class SideBySide:
    """Longer calls that don't wait for each other."""

    def propose(self, observation: Any, hardware: Any) -> list[Variant]:
        return [Variant("unlocked", predicted_gain=2.0, sites=(), reproducible=True)]

    def apply(self, model: torch.nn.Module, variant: Variant) -> Callable[[], None]:
        model.forward = types.MethodType(side_by_side, model)  # type: ignore[method-assign]
        return lambda: model.__dict__.pop("forward", None)

    def verify_applied(self, model: torch.nn.Module) -> bool:
        return True


@pytest.mark.parametrize(("objective", "kept"), [("latency", False), ("throughput", True)])
def test_longer_calls_that_run_at_once_win_by_throughput_only(objective: Any, kept: bool) -> None:
    model = Queueing().eval()
    kpt.optimize(
        model, torch.randn(4), objective=objective, plugins=[plugin(SideBySide)], cache=False, budget=30
    )
    receipt = kpt.report(model)
    assert receipt.optimized is kept, receipt
    if kept:
        assert "x the throughput" in receipt.headline() and "calls/s" in receipt.headline()
        assert f"{receipt.baseline['callers']} callers at once" in str(receipt)
        assert receipt.baseline["callers"] >= 2
    else:
        assert [entry.rule for entry in receipt.rejected] == ["slower"] and not ours(model)
    kpt.restore(model)


def test_training_steps_come_from_one_thread() -> None:
    model = net(training=True)
    threads: set[str] = set()
    original = type(model).forward

    class Watched(type(model)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            threads.add(threading.current_thread().name)
            return original(self, x)

    model.__class__ = Watched
    kpt.optimize(
        model,
        torch.randn(32, 16),
        objective="throughput",
        plugins=[plugin(DirectScale)],
        cache=False,
        budget=30,
    )
    receipt = kpt.report(model)
    assert receipt.optimized, receipt
    assert threads == {threading.current_thread().name}
    assert (receipt.baseline["callers"], receipt.baseline["queued"]) == (1, 8)
    assert "8 calls in a row" in str(receipt)


def test_a_call_at_a_time_is_what_latency_means() -> None:
    assert Load() == ONE_BY_ONE and ONE_BY_ONE.calls == 1
