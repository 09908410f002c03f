"""What a search leaves of its budget."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kpt.judge.clock import Timing
from kpt.specs import Phase, Variant
from kpt.transaction.budget import Budget
from kpt.transaction.ledger import Ledger
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
    ledger = Ledger(trials, (), Budget(budget, clock=lambda: trials.now))  # type: ignore[arg-type]
    assert ledger.time_for(89.0)
    ledger.run(Plan())
    assert ledger.time_for(left - 0.1) and not ledger.time_for(left + 0.1)


def test_a_trial_that_was_wrong_says_nothing_of_the_commit() -> None:
    trials = _Trials()
    ledger = Ledger(trials, (), Budget(100.0, clock=lambda: trials.now))  # type: ignore[arg-type]
    ledger.keep_for_commit(Outcome(Plan(), rule="value", setup_seconds=1.0, seconds=90.0))
    assert ledger.time_for(89.0)


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
    def __init__(self, plan: Plan | None = None) -> None:
        self.plan = plan

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
    trials.observation = SimpleNamespace(deterministic=False, baseline_seconds=1e-3)  # type: ignore[attr-defined]
    found = search.run()
    assert found.best is not None and found.best.plan.steps == (shapes,)
    assert {entry.name: entry.rule for entry in found.rejected} == {
        "compiler": "deadline",
        "other": "deadline",
    }


class _Company(_Trials):
    """Compilers take long, and fail or lose as told; a half alone is slower, with a compiler it is faster."""

    def __init__(self, fate: str) -> None:
        super().__init__()
        self.fate = fate
        self.seen: list[str] = []

    def run(self, plan: Plan, **options: Any) -> Outcome:
        self.seen.append(plan.key)
        names = {step.name for step in plan.steps}
        known = options["against"].plan if options["against"] else None
        slower = names == {"half"} or (known is not None and names < set(known.names))
        facts: dict[str, Any] = {"timing": SLOWER, "rule": "slower"} if slower else {"timing": FASTER}
        if "compiler" not in names:
            self.now += 1.0
            return Outcome(plan, seconds=1.0, applied=_Applied(plan), **facts)  # type: ignore[arg-type]
        self.now += 30.0
        if self.fate == "no-effect" and "kernel" in names:
            (culprit,) = [step for step in plan.steps if step.name == "kernel"]
            return Outcome(plan, rule="no-effect", reason="traced away", culprit=culprit, seconds=30.0)
        if self.fate in ("deadline", "value"):
            return Outcome(plan, rule=self.fate, reason="as told", seconds=30.0)
        return Outcome(plan, setup_seconds=29.0, seconds=30.0, applied=_Applied(plan), **facts)  # type: ignore[arg-type]


SLOWER = Timing(0.9, 0.8, 0.95, 1.0, 1.1, 16)


def _searched(fate: str, offered: list[Candidate], latency: float = 1e-3) -> tuple[Any, _Company]:
    trials = _Company(fate)
    trials.observation = SimpleNamespace(deterministic=False, baseline_seconds=latency)  # type: ignore[attr-defined]
    trials.log = []  # type: ignore[attr-defined]
    budget = Budget(200.0, clock=lambda: trials.now)
    search = Search(trials, Proposals(offered), budget)  # type: ignore[arg-type]
    search._gate = lambda: None  # type: ignore[method-assign]
    return search.run(), trials


@pytest.mark.parametrize("fate", ["deadline", "value"])
def test_what_needs_no_setup_is_kept_when_the_compiler_fails(fate: str) -> None:
    cast, compiler = _candidate("cast", "precision", 0.0), _candidate("compiler", "compile", 10.0)
    found, trials = _searched(fate, [cast, compiler])
    assert trials.seen[:2] == ["cast", "cast + compiler"]
    assert found.best.plan.steps == (cast,)
    assert {entry.name: entry.rule for entry in found.rejected} == {"compiler": fate}


def test_a_slow_model_is_not_tried_twice_where_once_will_do() -> None:
    cast, compiler = _candidate("cast", "precision", 0.0), _candidate("compiler", "compile", 10.0)
    found, trials = _searched("ok", [cast, compiler], latency=2.0)
    assert trials.seen[0] == "cast + compiler" and len(found.best.plan) == 2


def test_what_is_slower_alone_may_be_faster_under_the_compiler() -> None:
    half, compiler = _candidate("half", "precision", 0.0), _candidate("compiler", "compile", 10.0)
    found, trials = _searched("ok", [half, compiler])
    assert trials.seen[:2] == ["half", "half + compiler"] and len(found.best.plan) == 2


@pytest.mark.parametrize("wins", [True, False])
def test_a_step_without_effect_in_company_is_left_out_of_that_company(wins: bool) -> None:
    """It stays in the plan that it served, until the company without it is faster."""
    kernel, compiler = _candidate("kernel", "kernels", 0.0), _candidate("compiler", "compile", 10.0)
    trials: Any
    if wins:
        found, trials = _searched("no-effect", [kernel, compiler])
        assert found.best.plan.steps == (compiler,)
        assert [(entry.name, entry.rule) for entry in found.rejected] == [("kernel", "no-effect")]
        assert trials.seen == ["kernel", "kernel + compiler", "compiler"]
    else:
        cast = _candidate("cast", "precision", 0.0)
        found, trials = _searched("deadline", [kernel, cast, compiler])
        assert set(found.best.plan.steps) == {kernel, cast}


def test_the_gain_of_the_one_step_left_is_over_eager() -> None:
    """Not over the plan that the last trial was timed against."""
    kernel, compiler = _candidate("kernel", "kernels", 0.0), _candidate("compiler", "compile", 10.0)
    found, _ = _searched("no-effect", [kernel, compiler])
    assert found.gains == {"compiler": pytest.approx(4.0)}
