"""Steps that gain, lose or fail in the company of others only."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from kpt.judge.timing import Timing
from kpt.specs import Phase
from kpt.transaction import alternatives
from kpt.transaction.budget import Budget
from kpt.transaction.ledger import Ledger
from kpt.transaction.outcome import Outcome
from kpt.transaction.plan import Candidate, Plan
from kpt.transaction.search import Search
from told_trials import FASTER, Applied, Trials, candidate, outlined


class Company(Trials):
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
            return Outcome(plan, seconds=1.0, applied=Applied(plan), **facts)  # type: ignore[arg-type]
        self.now += 30.0
        if self.fate == "no-effect" and "kernel" in names:
            (culprit,) = [step for step in plan.steps if step.name == "kernel"]
            return Outcome(plan, rule="no-effect", reason="traced away", culprit=culprit, seconds=30.0)
        if self.fate in ("deadline", "value"):
            return Outcome(plan, rule=self.fate, reason="as told", seconds=30.0)
        return Outcome(plan, setup_seconds=29.0, seconds=30.0, applied=Applied(plan), **facts)  # type: ignore[arg-type]


SLOWER = Timing(0.9, 0.8, 0.95, 1.0, 1.1, 16)


def searched(fate: str, offered: list[Candidate], latency: float = 1e-3) -> tuple[Any, Company]:
    trials = Company(fate)
    return search_in(trials, offered, latency=latency).run(), trials


def search_in(
    trials: Company, offered: list[Candidate], seconds: float = 200.0, latency: float = 1e-3
) -> Search:
    """A search among ``offered`` that tries in ``trials``, by their clock, and judges no kernel alone."""
    trials.observation = SimpleNamespace(
        deterministic=False, stochastic=False, objective="latency", baseline_seconds=latency
    )
    trials.log = []  # type: ignore[attr-defined]
    search = Search(Ledger(trials, offered, Budget(seconds, clock=lambda: trials.now)))  # type: ignore[arg-type]
    search._gate = lambda: None  # type: ignore[method-assign]
    return search


class WithoutHalf(Company):
    """Without the half the compiler is as ``timing`` says, against both together."""

    def __init__(self, timing: Timing) -> None:
        super().__init__("ok")
        self.timing = timing

    def run(self, plan: Plan, **options: Any) -> Outcome:
        outcome = super().run(plan, **options)
        if plan.key == "compiler" and options["against"] is not None:
            outcome.timing, outcome.rule = self.timing, "slower"
        return outcome


def half_and_compiler() -> list[Candidate]:
    return [candidate("half", "precision", 0.0), candidate("compiler", "compile", 10.0)]


@pytest.mark.parametrize("fate", ["deadline", "value"])
def test_what_needs_no_setup_is_kept_when_the_compiler_fails(fate: str) -> None:
    cast, compiler = candidate("cast", "precision", 0.0), candidate("compiler", "compile", 10.0)
    found, trials = searched(fate, [cast, compiler])
    assert trials.seen[:2] == ["cast", "cast + compiler"]
    assert found.best.plan.steps == (cast,)
    assert {entry.name: entry.rule for entry in found.rejected} == {"compiler": fate}


def test_a_slow_model_is_not_tried_twice_where_once_will_do() -> None:
    cast, compiler = candidate("cast", "precision", 0.0), candidate("compiler", "compile", 10.0)
    found, trials = searched("ok", [cast, compiler], latency=2.0)
    assert trials.seen[0] == "cast + compiler" and len(found.best.plan) == 2


def test_what_is_slower_alone_may_be_faster_under_the_compiler() -> None:
    half, compiler = candidate("half", "precision", 0.0), candidate("compiler", "compile", 10.0)
    found, trials = searched("ok", [half, compiler])
    assert trials.seen[:2] == ["half", "half + compiler"] and len(found.best.plan) == 2


@pytest.mark.parametrize("wins", [True, False])
def test_a_step_without_effect_in_company_is_left_out_of_that_company(wins: bool) -> None:
    """It stays in the plan that it served, until the company without it is faster."""
    kernel, compiler = candidate("kernel", "kernels", 0.0), candidate("compiler", "compile", 10.0)
    trials: Any
    if wins:
        found, trials = searched("no-effect", [kernel, compiler])
        assert found.best.plan.steps == (compiler,)
        assert [(entry.name, entry.rule) for entry in found.rejected] == [("kernel", "no-effect")]
        assert trials.seen == ["kernel", "kernel + compiler", "compiler"]
    else:
        cast = candidate("cast", "precision", 0.0)
        found, trials = searched("deadline", [kernel, cast, compiler])
        assert set(found.best.plan.steps) == {kernel, cast}


def test_the_gain_of_the_one_step_left_is_over_eager() -> None:
    """Not over the plan that the last trial was timed against."""
    kernel, compiler = candidate("kernel", "kernels", 0.0), candidate("compiler", "compile", 10.0)
    found, _ = searched("no-effect", [kernel, compiler])
    assert found.gains == {"compiler": pytest.approx(4.0)}


def test_a_step_that_was_timed_with_and_without_it_is_not_dropped_again() -> None:
    kernel, compiler = candidate("kernel", "kernels", 0.0), candidate("compiler", "compile", 10.0)

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        return 1.0, "ok", 1.5 if against is None or len(names) == 2 else 0.7

    found, trials = outlined(200.0, [kernel, compiler], fate)
    assert [key for key, _ in trials.seen] == ["kernel", "kernel + compiler", "compiler"]
    assert found.gains["compiler"] == pytest.approx(1.5)


def test_a_compiler_that_fails_in_company_only_is_kept_without_it() -> None:
    """What it takes to see that it is innocent is not thrown away."""
    half, compiler = candidate("half", "precision", 0.0), candidate("compiler", "compile", 10.0)

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        if names == {"half", "compiler"}:
            return 8.0, "failed", 1.0
        return (20.0, "ok", 2.0) if "compiler" in names else (1.0, "ok", 0.8)

    found, trials = outlined(40.0, [half, compiler], fate)
    assert [key for key, _ in trials.seen] == ["half", "half + compiler", "compiler"]
    assert found.best.plan.steps == (compiler,)


@pytest.mark.parametrize("phase", ["kernels", "shapes"])
def test_what_makes_no_difference_without_a_compiler_is_tried_beside_it(phase: Phase) -> None:
    """Other shapes are dropped all the same: with them, a compiler is set up again."""
    step, quick = candidate("step", phase, 0.0, 1.1), candidate("quick", "compile", 1.0, 1.2)
    compiler = candidate("compiler", "compile", 30.0, 1.3)

    def speed(names: set[str]) -> float:
        compiled = 1.5 if "compiler" in names else 1.2 if "quick" in names else 1.0
        return compiled * (1.1 if {"step", "compiler"} <= names else 1.0)

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        before = set(against.plan.names) if against is not None else set()
        return 31.0 if "compiler" in names else 2.0, "ok", speed(names) / speed(before)

    found, trials = outlined(90.0, [step, quick, compiler], fate)
    keys = [key for key, _ in trials.seen]
    assert (keys[0].split(" + ").count("step"), keys[1]) == (1, "quick"), keys
    assert set(found.best.plan.steps) == ({step, compiler} if phase == "kernels" else {compiler}), keys


@pytest.mark.parametrize(("setup", "fuel"), [(500.0, None), (30.0, 2)])
def test_what_makes_no_difference_is_dropped_where_no_compiler_comes(setup: float, fuel: int | None) -> None:
    """One that there is no time for, or no fuel, stays open to the end; the plan does not wait for it."""
    step, quick = candidate("step", "kernels", 0.0, 1.1), candidate("quick", "runtime", 1.0, 1.2)
    compiler = candidate("compiler", "compile", setup, 1.15)

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        before = set(against.plan.names) if against is not None else set()
        return 2.0, "ok", (1.2 if "quick" in names else 1.0) / (1.2 if "quick" in before else 1.0)

    found, trials = outlined(90.0, [step, quick, compiler], fate, fuel=fuel)
    assert set(found.best.plan.steps) == {quick}, trials.seen


def test_what_made_no_difference_is_not_timed_again_before_the_end() -> None:
    step, quick = candidate("step", "kernels", 0.0, 1.1), candidate("quick", "compile", 1.0, 1.2)
    first, second = candidate("first", "compile", 20.0, 1.3), candidate("second", "compile", 20.0, 1.1)

    def speed(names: set[str]) -> float:
        return 1.2 if "quick" in names else 0.9

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        before = set(against.plan.names) if against is not None else set()
        faster = speed(names) / (speed(before) if before else 1.0)
        return 21.0 if names & {"first", "second"} else 2.0, "ok", faster

    found, trials = outlined(200.0, [step, quick, first, second], fate)
    keys = [key for key, _ in trials.seen]
    assert set(found.best.plan.steps) == {quick}, keys
    assert {"step + first", "step + second"} <= set(keys) and keys.count("quick") == 2, keys


@pytest.mark.parametrize(("median", "stays"), [(0.86, True), (0.97, False)])
def test_a_step_stays_where_noise_hides_a_gain_that_is_likely(median: float, stays: bool) -> None:
    """The clock tells neither case apart from no difference; of a busy machine that is said of 16 % too."""
    trials = WithoutHalf(Timing(median, median - 0.2, 1.05, 1.0, 1.0 / median, 16))
    found = search_in(trials, half_and_compiler()).run()
    assert "compiler" in trials.seen, "the step was not left out for a trial"
    assert set(found.best.plan.names) == ({"half", "compiler"} if stays else {"compiler"})
    assert found.doubts == ({"half": "in doubt: its gain lies between 0.95x and 1.52x"} if stays else {})


def test_a_step_stays_without_which_all_calls_together_take_longer() -> None:
    """What it gains for slow calls the others hide; the commit would refuse the plan without it."""
    trials = WithoutHalf(Timing(0.99, 0.97, 1.02, 1.0, 1.3, 16, total=0.77, total_high=0.8))
    found = search_in(trials, half_and_compiler()).run()
    assert "compiler" in trials.seen and set(found.best.plan.names) == {"half", "compiler"}
    assert found.doubts == {"half": "all kinds of calls together take 1.30 times as long without it"}


def test_what_another_step_needs_is_left_out_once_only() -> None:
    """Packing has an effect on what a policy casts: each plan without the policy had been tried in vain."""

    class Packing(Company):
        def run(self, plan: Plan, **options: Any) -> Outcome:
            outcome = super().run(plan, **options)
            packing = [step for step in plan.steps if step.name == "packing"]
            if packing and "cast" not in plan.names:
                self.now += 1.0
                return Outcome(
                    plan, rule="no-effect", reason="nothing to pack", culprit=packing[0], seconds=1.0
                )
            return outcome

    trials = Packing("ok")
    cast, packing = candidate("cast", "precision", 0.0), candidate("packing", "kernels", 0.0)
    later = candidate("later", "shapes", 0.0)
    search = search_in(trials, [cast, packing, later])

    def vain() -> list[str]:
        return [key for key in trials.seen if "packing" in key and "cast" not in key]

    best = search._ablate(search.ledger.run(Plan.of([cast, packing])))
    assert set(best.plan.steps) == {cast, packing} and vain() == ["packing"]
    best = search._ablate(search.ledger.run(Plan.of([cast, packing, later]), against=best))
    assert set(best.plan.steps) == {cast, packing, later} and vain() == ["packing"]


def test_a_step_that_was_timed_too_little_stays_and_is_not_timed_again() -> None:
    trials = WithoutHalf(Timing(1.2, 0.0, math.inf, 1.0, 1.0, 2))
    found = search_in(trials, half_and_compiler(), 400.0).run()
    assert trials.seen.count("compiler") == 1 and set(found.best.plan.names) == {"half", "compiler"}
    assert "half was timed too little to tell what it gains" in found.notes


def freed(fate: Any, gain: float = 2.4) -> tuple[Any, Any]:
    """An engine that takes no kernel, a compiler that does, and a kernel that gains beside that."""
    engine = replace(candidate("engine", "compile", 5.0, 2.5), conflicts=frozenset({"kernel"}))
    kernel = replace(candidate("kernel", "kernels", 0.0, 1.1), kernel=True)
    return outlined(200.0, [engine, candidate("compiler", "compile", 20.0, gain), kernel], fate)


@pytest.mark.parametrize("gain", [2.4, 2.2])  # it comes before what is dropped one by one, and after that
def test_a_compiler_in_place_of_one_that_takes_no_kernels_gets_those_that_it_kept_out(gain: float):
    gains = {frozenset({"engine"}): 2.0, frozenset({"compiler", "kernel"}): 1.3, frozenset({"compiler"}): 0.9}
    found, trials = freed(lambda names, against: (5.0, "ok", gains.get(frozenset(names), 0.8)), gain)
    assert found.best.plan.names == ("kernel", "compiler")
    assert [plan for plan, _ in trials.seen][:2] == ["engine", "kernel + compiler"]
    assert [entry.name for entry in found.rejected] == ["engine"]


@pytest.mark.parametrize("rule", ["value", "slower"])
def test_a_kernel_does_not_cost_the_compiler_that_it_came_along_with(rule: str):
    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        gain = 2.0 if "engine" in names else 0.9 if "kernel" in names else 1.2
        return 5.0, "value" if "kernel" in names and rule == "value" else "ok", gain

    found, trials = freed(fate)
    assert found.best.plan.names == ("compiler",)
    assert [plan for plan, _ in trials.seen][:3] == ["engine", "kernel + compiler", "compiler"]
    assert ("kernel", rule) in [(entry.name, entry.rule) for entry in found.rejected]


def test_what_was_stopped_is_not_tried_again_without_the_kernels():
    found, trials = freed(lambda names, against: (5.0 if "engine" in names else 500.0, "ok", 2.0))
    assert found.best.plan.names == ("engine",)
    assert [plan for plan, _ in trials.seen] == ["engine", "kernel + compiler"]


def test_what_a_kernel_itself_sets_up_is_not_brought_along():
    engine = replace(candidate("engine", "compile", 5.0, 2.5), conflicts=frozenset({"kernel"}))
    kernel = replace(candidate("kernel", "kernels", 30.0, 1.1), kernel=True)
    offered = [engine, candidate("compiler", "compile", 20.0, 2.4), kernel]
    _, trials = outlined(200.0, offered, lambda names, against: (5.0, "ok", 1.2))
    assert [plan for plan, _ in trials.seen][:2] == ["engine", "compiler"]


@pytest.mark.parametrize(
    ("gain", "announced", "kept"),
    [(1.02, 16.0, False), (1.05, 16.0, True), (1.02, 12.0, True), (1.0, 2.0, True), (1.0, 4.0, False)],
)
def test_what_takes_longer_to_set_up_has_to_give_that_back(gain: float, announced: float, kept: bool) -> None:
    """Two in a hundred of ten minutes are twelve seconds. What a trial took may be a cache's answer."""
    quick, slow = candidate("quick", "compile", 2.0, gain=2.0), candidate("slow", "compile", announced, 1.9)

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        return (1.0 + announced, "ok", gain) if names == {"slow"} else (3.0, "ok", 2.0)

    found, trials = outlined(600.0, [quick, slow], fate)
    assert [key for key, _ in trials.seen] == ["quick", "slow"]
    assert found.best.plan.steps == ((slow,) if kept else (quick,))
    (entry,) = found.rejected
    assert entry.rule == "slower"
    if not kept:
        assert f"{gain:.2f}x, which does not give back" in entry.reason
        assert f"the {announced - 2:.0f} s" in entry.reason
        assert entry.gain == pytest.approx(gain)


@pytest.mark.parametrize(
    ("setup", "before", "gain", "late"),
    [
        (8.0, 5.0, 1.01, None),  # ready within 20 s: 5 before the first trial, 8, and half as much again as 4
        (9.5, 5.0, 1.01, None),  # by a moment
        (18.0, 5.0, 1.05, "the 9 s by which a later process would be ready after 20 s"),
        (18.0, 5.0, 1.12, None),
        (18.0, 14.0, 1.02, "the 4 s by which a later process would be ready after 25 s"),  # as before
        (30.0, 30.0, 1.01, None),
        (80.0, 5.0, 1.4, None),
    ],
)
def test_what_keeps_a_later_process_waiting_has_to_gain_a_tenth(
    setup: float, before: float, gain: float, late: str | None
) -> None:
    """A tenth of each call. What a trial took counts for nothing, and neither does what came before it."""
    trials: Any = Trials()
    trials.began = 5.0
    budget = Budget(600.0)
    budget.spent = lambda: 100.0  # type: ignore[method-assign]
    steps = [candidate(*each) for each in (("best", "compile", before), ("other", "compile", setup))]
    ledger = Ledger(trials, steps, budget)
    timing = replace(FASTER, ratio=gain, total=None)
    best, other = (
        Outcome(Plan.of([step]), timing=timing, setup_seconds=taken, seconds=taken + 4.0)
        for step, taken in zip(steps, (0.1, 300.0), strict=True)
    )
    found = alternatives._too_long(ledger, other, best)
    assert (late in found) if late is not None else found == ""


@pytest.mark.parametrize(("total", "seconds"), [(None, 600.0 / 3.0), (1.2, 100.0), (0.98, 0.0)])
def test_what_is_given_back_are_the_seconds_of_all_calls(total: float | None, seconds: float) -> None:
    """Not the mean of the kinds' ratios: the commonest may be the shortest."""
    trials = SimpleNamespace(observation=SimpleNamespace(objective="latency"))
    ledger: Any = SimpleNamespace(trials=trials, pace=1.0, ready=lambda outcome: 10.0)
    timing = replace(FASTER, ratio=1.5, total=total)
    best = Outcome(Plan.of([candidate("best", "compile", 10.0)]), timing=timing)

    def longer(by: float) -> str:
        step = candidate("longer", "compile", 10.0 + by)
        return alternatives._too_long(ledger, Outcome(Plan.of([step]), timing=timing), best)

    assert not longer(seconds - 1.0) and f"the {seconds + 1.0:.0f} s that its set-up" in longer(seconds + 1.0)
    trials.observation.objective = "memory"
    assert not longer(seconds + 1.0)


def test_kernels_that_come_along_are_named_where_it_is_not_given_back() -> None:
    """And their gain is not put down to the compiler that they came with."""
    plain = candidate("plain", "compile", 10.0, gain=2.0)
    taking = candidate("taking", "compile", 40.0, gain=1.9)
    kernel = candidate("kernel", "kernels", 0.0, gain=1.2)
    best = Outcome(Plan.of([plain]), timing=FASTER, over_eager=2.0, applied=Applied())  # type: ignore[arg-type]
    timing = Timing(1.03, 1.02, 1.04, 1.0, 0.97, 16)
    rejected: list[tuple[Any, ...]] = []
    ledger: Any = SimpleNamespace(
        trials=SimpleNamespace(observation=SimpleNamespace(objective="latency")),
        pace=1.0,
        ready=lambda outcome: 10.0,
        run=lambda plan, against: Outcome(plan, timing=timing, applied=Applied()),
        reject=lambda *entry: rejected.append(entry),
    )
    assert alternatives._in_place(ledger, taking, Plan.of([taking]), best, [kernel]) is best
    ((who, rule, reason, gain),) = rejected
    assert who is taking and rule == "slower" and gain is None
    assert reason.startswith("1.03x with kernel, which does not give back") and "the 30 s" in reason
