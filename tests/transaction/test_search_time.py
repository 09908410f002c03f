"""What a search leaves of its budget."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kpt.judge.clock import Timing
from kpt.specs import Phase, Variant
from kpt.transaction.budget import Budget
from kpt.transaction.plan import Candidate, Plan, Proposals
from kpt.transaction.search import Search
from kpt.transaction.trial import Outcome

FASTER = Timing(2.0, 1.9, 2.1, 1.0, 0.5, 16)


class _Trials:
    """Trials that take the time that they are told to, by a clock of their own."""

    def __init__(self) -> None:
        self.now = 0.0

    def run(self, plan: Plan, **options: Any) -> Outcome:
        self.now += 50.0
        return Outcome(plan, timing=FASTER, setup_seconds=20.0, seconds=50.0)


@pytest.mark.parametrize(("budget", "left"), [(100.0, 5.0), (1000.0, 850.0)])
def test_the_commit_of_a_slow_model_keeps_the_time_that_it_will_need(budget: float, left: float) -> None:
    """It does again what took a trial 30 seconds, and for longer: 45 of 100 s, where a tenth is 10."""
    trials = _Trials()
    search = Search(trials, Proposals(), Budget(budget, clock=lambda: trials.now))  # type: ignore[arg-type]
    assert search._time_for(89.0)
    search._try(Plan())
    assert search._time_for(left - 0.1) and not search._time_for(left + 0.1)


def test_a_trial_that_was_wrong_says_nothing_of_the_commit() -> None:
    trials = _Trials()
    search = Search(trials, Proposals(), Budget(100.0, clock=lambda: trials.now))  # type: ignore[arg-type]
    search._keep_for_commit(Outcome(Plan(), rule="value", setup_seconds=1.0, seconds=90.0))
    assert search._time_for(89.0)


def _candidate(name: str, phase: Phase, setup: float) -> Candidate:
    variant = Variant(name, predicted_gain=1.5, setup_seconds=setup)
    return Candidate(variant, phase, "test", name, make=lambda: None)


class _Stopping(_Trials):
    """Compilers never come back; whatever else is tried is faster."""

    def run(self, plan: Plan, **options: Any) -> Outcome:
        if any(step.phase == "compile" for step in plan.steps):
            self.now += 20.0
            return Outcome(plan, rule="deadline", reason="stopped", seconds=20.0)
        self.now += 1.0
        return Outcome(plan, timing=FASTER, seconds=1.0, applied=_Applied())  # type: ignore[arg-type]


class _Applied:
    def close(self) -> None:
        pass


@pytest.mark.parametrize("setup", [5.0, 10.0])
def test_a_compiler_that_was_stopped_says_nothing_of_the_shapes_beside_it(setup: float) -> None:
    """They announced its set-up, which without it they do not have."""
    shapes, other = _candidate("shapes", "shapes", 10.0), _candidate("other", "compile", 10.0)
    compiler = _candidate("compiler", "compile", setup)
    trials = _Stopping()
    offered = Proposals([shapes, compiler, other] if setup < 10.0 else [shapes, other, compiler])
    search = Search(trials, offered, Budget(100.0, clock=lambda: trials.now))  # type: ignore[arg-type]
    trials.observation = SimpleNamespace(deterministic=False)  # type: ignore[attr-defined]
    found = search.run()
    assert found.best is not None and found.best.plan.steps == (shapes,)
    assert {entry.name: entry.rule for entry in found.rejected} == {
        "compiler": "deadline",
        "other": "deadline",
    }
