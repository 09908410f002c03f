"""Torch's deterministic mode: the clock refuses a plan as a whole, or not at all; it chooses none."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import fingerprints
import hostile_passes
import kpt
import mixed_models
import stopping_passes
from kpt.judge.timing import Timing
from kpt.judge.verdict import Verdict
from kpt.specs import Variant
from kpt.transaction import gate, trial
from slow_models import DirectScale, net, plugin

EXAMPLE = torch.randn(32, 16)


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def optimized(*passes: type, **options: object) -> tuple[torch.nn.Module, kpt.Receipt]:
    model = net()
    kpt.optimize(model, EXAMPLE, plugins=[plugin(*passes)], **{"cache": False, "budget": 10.0, **options})
    return model, kpt.report(model)


@pytest.mark.parametrize("late", [stopping_passes.Loops, stopping_passes.SleepsInSteps])
def test_a_step_that_runs_out_of_time_takes_the_whole_plan_along(late):
    """On a faster machine it might be in time, and the bits would be others."""
    model, receipt = optimized(late, DirectScale, budget=4.0)
    assert not receipt.optimized
    rules = {entry.name: entry.rule for entry in receipt.rejected}
    assert rules == {"DirectScale:direct": "deadline", f"{late.__name__}:direct": "deadline"}
    assert any("as a whole" in entry.reason for entry in receipt.rejected)
    assert fingerprints.ours(model) == []


def test_a_kernel_that_is_judged_for_too_long_takes_the_whole_plan_along(monkeypatch):
    late = Verdict(False, "deadline", "judging the kernel alone took more than a fifth of the budget")
    monkeypatch.setattr(gate, "judge", lambda candidate, trials: late)
    model = mixed_models.mixed()
    offered = mixed_models.plugins()
    kpt.optimize(model, torch.randn(64, 64), plugins=offered, cache=False, budget=20.0)
    receipt = kpt.report(model)
    assert not receipt.optimized and receipt.trials == []
    assert {entry.rule for entry in receipt.rejected} == {"deadline"} and len(receipt.rejected) == 4


def test_a_stack_that_is_slower_is_refused_as_a_whole(monkeypatch):
    monkeypatch.setattr(trial.Trials, "time", lambda *args, **kwargs: Timing(0.9, 0.8, 1.0, 1e-3, 1e-3, 8))
    _, receipt = optimized(hostile_passes.Slower, DirectScale)
    assert not receipt.optimized
    assert {entry.rule for entry in receipt.rejected} == {"slower"} and len(receipt.rejected) == 2
    assert len(receipt.trials) == 1


def test_what_is_wrong_is_left_out_by_itself():
    _, receipt = optimized(hostile_passes.OnePercent, DirectScale)
    assert receipt.optimized, receipt.rejected
    assert [(entry.name, entry.rule) for entry in receipt.rejected] == [("OnePercent:direct", "value")]


def test_a_step_that_raises_is_left_out_by_itself():
    _, receipt = optimized(hostile_passes.ApplyRaises, DirectScale)
    assert [entry.name for entry in receipt.accepted] == ["DirectScale:direct"], receipt.rejected
    assert [entry.name for entry in receipt.rejected] == ["ApplyRaises:direct"]


class Doubles(DirectScale):
    """Right alone: it adds nothing, unless another step left its mark."""

    variant = Variant("direct", predicted_gain=1.2, reproducible=True)

    def apply(self, model: torch.nn.Module, variant: Variant) -> Callable[[], None]:
        undo = super().apply(model, variant)
        marked = getattr(model, "marks", 0)
        model.marks = marked + 1
        if marked:
            fast = model.slow.forward
            model.slow.forward = lambda x: fast(x) * 2

        def both() -> None:
            undo()
            vars(model).pop("marks", None)

        return both


class DoublesToo(Doubles):
    variant = Variant("direct", predicted_gain=1.1, reproducible=True)


class DoublesAsWell(Doubles):
    variant = Variant("direct", predicted_gain=1.3, reproducible=True)


@pytest.mark.parametrize("passes", [(Doubles, DoublesToo), (DoublesAsWell, Doubles)])
def test_what_fails_in_company_is_left_out_in_an_order_that_no_clock_measured(passes):
    _, receipt = optimized(*passes)
    (rejected,) = receipt.rejected
    assert rejected.rule == "value" and "in company of" in rejected.reason
    assert rejected.name == max(f"{each.__name__}:direct" for each in passes)
