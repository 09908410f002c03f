"""What a search leaves of its budget, and what it still begins with what is left."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kpt.specs import Variant
from kpt.transaction.budget import Budget
from kpt.transaction.ledger import Ledger
from kpt.transaction.outcome import Outcome
from kpt.transaction.plan import Candidate, Plan
from kpt.transaction.search import Search
from told_trials import FASTER, Applied, Trials, candidate, outlined


@pytest.mark.parametrize(("budget", "left"), [(100.0, 5.0), (1000.0, 850.0)])
def test_the_commit_of_a_slow_model_keeps_the_time_that_it_will_need(budget: float, left: float) -> None:
    """It does again what took a trial 30 seconds, and for longer: 45 of 100 s, where a tenth is 10."""
    trials = Trials()
    ledger = Ledger(trials, (), Budget(budget, clock=lambda: trials.now))  # type: ignore[arg-type]
    assert ledger.time_for(89.0)
    ledger.run(Plan())
    assert ledger.time_for(left - 0.1) and not ledger.time_for(left + 0.1)


def test_a_trial_that_was_wrong_says_nothing_of_the_commit() -> None:
    trials = Trials()
    ledger = Ledger(trials, (), Budget(100.0, clock=lambda: trials.now))  # type: ignore[arg-type]
    ledger.keep_for_commit(Outcome(Plan(), rule="value", setup_seconds=1.0, seconds=90.0))
    assert ledger.time_for(89.0)


@pytest.mark.parametrize(("stochastic", "seconds"), [(False, 10.0), (True, 20.0)])
def test_with_dropout_a_trial_is_expected_to_set_its_plan_up_twice(stochastic: bool, seconds: float) -> None:
    """Once with dropout, and once without, for the values."""
    trials = Trials()
    trials.observation.stochastic = stochastic
    ledger = Ledger(trials, (), Budget(100.0, clock=lambda: trials.now))  # type: ignore[arg-type]
    plan = Plan.of([candidate("compiler", "compile", 10.0)])
    assert ledger.setup(plan) == ledger.announced(plan) == seconds
    ledger.run(plan)  # which takes 20 s to set up once: its values were wrong, say
    assert ledger.setup(plan) == 2.0 * seconds


class Stopping(Trials):
    """Compilers never come back; whatever else is tried is faster."""

    def run(self, plan: Plan, **options: Any) -> Outcome:
        if any(step.phase == "compile" for step in plan.steps):
            self.now += 20.0
            return Outcome(plan, rule="deadline", reason="stopped", seconds=20.0)
        self.now += 1.0
        return Outcome(plan, timing=FASTER, seconds=1.0, applied=Applied())  # type: ignore[arg-type]


@pytest.mark.parametrize("setup", [5.0, 10.0])
def test_a_compiler_that_was_stopped_says_nothing_of_the_shapes_beside_it(setup: float) -> None:
    """They announced its set-up, which without it they do not have."""
    shapes, other = candidate("shapes", "shapes", 10.0), candidate("other", "compile", 10.0)
    compiler = candidate("compiler", "compile", setup)
    trials = Stopping()
    offered = [shapes, compiler, other] if setup < 10.0 else [shapes, other, compiler]
    search = Search(Ledger(trials, offered, Budget(100.0, clock=lambda: trials.now)))  # type: ignore[arg-type]
    trials.observation = SimpleNamespace(
        deterministic=False, stochastic=False, objective="latency", baseline_seconds=1e-3
    )
    found = search.run()
    assert found.best is not None and found.best.plan.steps == (shapes,)
    assert {entry.name: entry.rule for entry in found.rejected} == {
        "compiler": "deadline",
        "other": "deadline",
    }


def test_a_compiler_that_never_comes_back_leaves_time_for_what_needs_none() -> None:
    """Together they are slower, so that nothing was accepted before the compiler; one alone is faster."""
    half, kernel = candidate("half", "precision", 0.0), candidate("kernel", "kernels", 0.0)
    compiler = candidate("compiler", "compile", 10.0)

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        if "compiler" in names:
            return 1e9, "ok", 1.0
        return 1.0, "ok", 0.8 if "half" in names else 1.2

    found, trials = outlined(40.0, [half, kernel, compiler], fate)
    assert found.best.plan.steps == (kernel,)
    assert trials.seen[0][0] == "half + kernel" and "compiler" in trials.seen[1][0]


def test_a_stack_without_setup_that_hangs_does_not_take_the_time_of_the_compiler() -> None:
    hanging, compiler = candidate("hanging", "kernels", 0.0), candidate("compiler", "compile", 10.0)

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        return (1e9 if "hanging" in names else 20.0), "ok", 2.0

    found, trials = outlined(100.0, [hanging, compiler], fate)
    assert trials.seen[0][0] == "hanging" and trials.seen[1][1] <= 25.0
    assert found.best.plan.steps == (compiler,)


def test_what_sets_a_compiler_up_twice_is_left_out_where_once_is_all_there_is_time_for() -> None:
    compiler, shapes = candidate("compiler", "compile", 15.0), candidate("shapes", "shapes", 15.0)

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        return (1.0 + 15.0 * len(names) if "compiler" in names else 1.0), "ok", 1.5 if names else 1.0

    found, trials = outlined(40.0, [compiler, shapes], fate, latency=0.2)
    assert trials.seen[0][0] == "compiler"
    assert compiler in found.best.plan.steps


def test_how_long_one_compiler_took_tells_how_long_another_one_will() -> None:
    """It took three times what it had announced: the other does not fit, and is left for the end."""
    first, second = candidate("first", "compile", 10.0), candidate("second", "compile", 12.0)

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        return (31.0 if "first" in names else 1e9), "ok", 2.0

    found, trials = outlined(60.0, [first, second], fate)
    assert found.best.plan.steps == (first,)
    assert [key for key, _ in trials.seen] == ["first"]


def test_what_is_left_at_the_end_goes_to_what_was_expected_to_take_longer() -> None:
    kernel, compiler = candidate("kernel", "kernels", 0.0), candidate("compiler", "compile", 60.0)

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        return (25.0 if "compiler" in names else 1.0), "ok", 1.5

    found, trials = outlined(40.0, [kernel, compiler], fate)
    assert [key for key, _ in trials.seen] == ["kernel", "kernel + compiler"]
    assert set(found.best.plan.steps) == {kernel, compiler}


def test_what_could_never_be_ready_in_time_is_not_begun() -> None:
    kernel, compiler = candidate("kernel", "kernels", 0.0), candidate("compiler", "compile", 500.0)
    found, trials = outlined(40.0, [kernel, compiler], lambda names, against: (1.0, "ok", 1.5))
    assert [key for key, _ in trials.seen] == ["kernel"]
    ((name, rule, reason),) = [(entry.name, entry.rule, entry.reason) for entry in found.rejected]
    assert (name, rule) == ("compiler", "budget")
    assert "expected to take 501 s; 39 s were left" in reason, reason


def test_what_is_excluded_by_a_choice_is_told_by_whose() -> None:
    chosen, other = candidate("chosen", "compile", 10.0), candidate("other", "compile", 12.0)
    found, _ = outlined(20.0, [chosen, other], lambda names, against: (12.0, "ok", 1.5))
    (entry,) = found.rejected
    assert (entry.name, entry.rule) == ("other", "budget")
    assert "in place of chosen (a plan holds one compile variant)" in entry.reason


def test_after_a_compiler_that_was_stopped_a_quicker_one_is_tried_without_what_loses() -> None:
    """There is time for one more: the step that loses without a compiler's help must not be in it."""
    half, compiler = candidate("half", "precision", 0.0), candidate("compiler", "compile", 10.0)
    variant = Variant("quicker", predicted_gain=1.2, setup_seconds=2.0)
    quicker = Candidate(variant, "compile", "test", "quicker", make=lambda: None)

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        if "compiler" in names:
            return 1e9, "ok", 1.0
        return 1.0 + 2.0 * ("quicker" in names), "ok", 1.1 if names == {"quicker"} else 0.8

    found, trials = outlined(40.0, [half, compiler, quicker], fate)
    assert [key for key, _ in trials.seen[:3]] == ["half", "half + compiler", "quicker"]
    assert found.best.plan.steps == (quicker,)


def test_what_hangs_in_a_stack_without_setup_is_found_and_the_others_are_kept() -> None:
    hanging, good = candidate("hanging", "kernels", 0.0), candidate("good", "layout", 0.0)
    compiler = candidate("compiler", "compile", 10.0)

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        seconds = 1e9 if "hanging" in names else 11.0 if "compiler" in names else 1.0
        return seconds, "ok", 0.7 if against is not None and names < set(against.plan.names) else 1.5

    found, trials = outlined(200.0, [hanging, good, compiler], fate)
    assert set(found.best.plan.steps) == {good, compiler}
    assert [(entry.name, entry.rule) for entry in found.rejected] == [("hanging", "deadline")]
    assert trials.now < 100.0


def test_what_there_was_no_time_to_try_beside_the_best_is_not_called_slower() -> None:
    """All together they were slower, in a moment's noise; alone each is faster; then the time is up."""
    steps = [candidate(f"kernel{n}", "kernels", 0.0) for n in range(3)]

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        if len(names) == 3:
            return 2.0, "ok", 0.9
        return 3.0, "ok", 3.0 if "kernel0" in names else 1.2

    found, trials = outlined(13.0, steps, fate)
    assert found.best.plan.steps == (steps[0],)
    assert [(entry.name, entry.rule) for entry in found.rejected] == [
        ("kernel1", "budget"),
        ("kernel2", "budget"),
    ]
    for entry in found.rejected:
        assert "1.20x alone" in entry.reason and "s were left" in entry.reason
    assert len(trials.seen) == 4


def test_time_is_kept_for_the_commit_of_a_plan_and_of_what_lies_beneath_it() -> None:
    trials = Trials()
    ledger = Ledger(trials, (), Budget(100.0, clock=lambda: trials.now))  # type: ignore[arg-type]
    beneath = Outcome(Plan.of([candidate("strict", "compile", 1.0)]), timing=FASTER, seconds=20.0)
    bold = Plan.of([candidate("bold", "precision", 0.0, level="production")])
    ledger.supersede(beneath, outcome := Outcome(bold, timing=FASTER, setup_seconds=2.0, seconds=12.0))
    assert outcome.beneath is beneath
    assert ledger.time_for(54.9) and not ledger.time_for(55.1), "1.5 times 20 s and 10 s"
