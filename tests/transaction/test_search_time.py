"""What a search leaves of its budget."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from kpt.judge.clock import Timing
from kpt.specs import Level, Phase, Variant
from kpt.transaction.budget import Budget
from kpt.transaction.ledger import Ledger
from kpt.transaction.outcome import Outcome
from kpt.transaction.plan import Candidate, Plan, Proposals
from kpt.transaction.search import Search

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


def _candidate(name: str, phase: Phase, setup: float, gain: float = 1.5, level: Level = "exact") -> Candidate:
    variant = Variant(name, predicted_gain=gain, setup_seconds=setup)
    return Candidate(variant, phase, "test", name, make=lambda: None, level=level)


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


def _outlined(
    budget: float, offered: list[Candidate], fate: Any, latency: float = 1e-3, fuel: int | None = None
) -> tuple[Any, Any]:
    """A search in which ``fate(names, patience)`` says how long each trial takes and how it ends."""

    class Told(_Trials):
        def __init__(self) -> None:
            super().__init__()
            self.observation = SimpleNamespace(deterministic=False, baseline_seconds=latency)
            self.log: list[Outcome] = []
            self.seen: list[tuple[str, float]] = []

        def run(self, plan: Plan, **options: Any) -> Outcome:
            self.seen.append((plan.key, self.now))
            seconds, rule, gain = fate(set(plan.names), options["against"])
            if seconds > options["seconds"]:
                self.now += options["seconds"]
                return Outcome(plan, rule="deadline", reason="stopped", seconds=options["seconds"])
            self.now += seconds
            timing = Timing(gain, 0.98 * gain, 1.02 * gain, 1.0, 1.0 / gain, 16)
            rule = "slower" if rule == "ok" and gain < 1.0 else rule
            setup = max(0.0, seconds - 1.0)
            return Outcome(
                plan,
                rule=rule,
                timing=timing,
                setup_seconds=setup,
                seconds=seconds,
                applied=_Applied(plan),  # type: ignore[arg-type]
            )

    trials = Told()
    time = Budget(budget, clock=lambda: trials.now)
    search = Search(trials, Proposals(offered), time, fuel=fuel)  # type: ignore[arg-type]
    search._gate = lambda: None  # type: ignore[method-assign]
    return search.run(), trials


def test_a_compiler_that_never_comes_back_leaves_time_for_what_needs_none() -> None:
    """Together they are slower, so that nothing was accepted before the compiler; one alone is faster."""
    half, kernel = _candidate("half", "precision", 0.0), _candidate("kernel", "kernels", 0.0)
    compiler = _candidate("compiler", "compile", 10.0)

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        if "compiler" in names:
            return 1e9, "ok", 1.0
        return 1.0, "ok", 0.8 if "half" in names else 1.2

    found, trials = _outlined(40.0, [half, kernel, compiler], fate)
    assert found.best.plan.steps == (kernel,)
    assert trials.seen[0][0] == "half + kernel" and "compiler" in trials.seen[1][0]


def test_a_stack_without_setup_that_hangs_does_not_take_the_time_of_the_compiler() -> None:
    hanging, compiler = _candidate("hanging", "kernels", 0.0), _candidate("compiler", "compile", 10.0)

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        return (1e9 if "hanging" in names else 20.0), "ok", 2.0

    found, trials = _outlined(100.0, [hanging, compiler], fate)
    assert trials.seen[0][0] == "hanging" and trials.seen[1][1] <= 25.0
    assert found.best.plan.steps == (compiler,)


def test_what_sets_a_compiler_up_twice_is_left_out_where_once_is_all_there_is_time_for() -> None:
    compiler, shapes = _candidate("compiler", "compile", 15.0), _candidate("shapes", "shapes", 15.0)

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        return (1.0 + 15.0 * len(names) if "compiler" in names else 1.0), "ok", 1.5 if names else 1.0

    found, trials = _outlined(40.0, [compiler, shapes], fate, latency=0.2)
    assert trials.seen[0][0] == "compiler"
    assert compiler in found.best.plan.steps


def test_how_long_one_compiler_took_tells_how_long_another_one_will() -> None:
    """It took three times what it had announced: the other does not fit, and is left for the end."""
    first, second = _candidate("first", "compile", 10.0), _candidate("second", "compile", 12.0)

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        return (31.0 if "first" in names else 1e9), "ok", 2.0

    found, trials = _outlined(60.0, [first, second], fate)
    assert found.best.plan.steps == (first,)
    assert [key for key, _ in trials.seen] == ["first"]


def test_what_is_left_at_the_end_goes_to_what_was_expected_to_take_longer() -> None:
    kernel, compiler = _candidate("kernel", "kernels", 0.0), _candidate("compiler", "compile", 60.0)

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        return (25.0 if "compiler" in names else 1.0), "ok", 1.5

    found, trials = _outlined(40.0, [kernel, compiler], fate)
    assert [key for key, _ in trials.seen] == ["kernel", "kernel + compiler"]
    assert set(found.best.plan.steps) == {kernel, compiler}


def test_what_could_never_be_ready_in_time_is_not_begun() -> None:
    kernel, compiler = _candidate("kernel", "kernels", 0.0), _candidate("compiler", "compile", 500.0)
    found, trials = _outlined(40.0, [kernel, compiler], lambda names, against: (1.0, "ok", 1.5))
    assert [key for key, _ in trials.seen] == ["kernel"]
    ((name, rule, reason),) = [(entry.name, entry.rule, entry.reason) for entry in found.rejected]
    assert (name, rule) == ("compiler", "budget")
    assert "expected to take 501 s; 39 s were left" in reason, reason


def test_what_is_excluded_by_a_choice_is_told_by_whose() -> None:
    chosen, other = _candidate("chosen", "compile", 10.0), _candidate("other", "compile", 12.0)
    found, _ = _outlined(20.0, [chosen, other], lambda names, against: (12.0, "ok", 1.5))
    (entry,) = found.rejected
    assert (entry.name, entry.rule) == ("other", "budget")
    assert "in place of chosen (a plan holds one compile variant)" in entry.reason


def test_an_alternative_that_promises_much_comes_before_dropping_steps_that_need_a_compiler_each() -> None:
    half, compiler = _candidate("half", "precision", 0.0, 1.2), _candidate("compiler", "compile", 10.0)
    better = Candidate(
        Variant("better", predicted_gain=2.0, setup_seconds=60.0),
        "compile",
        "test",
        "better",
        make=lambda: None,
    )

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        return (11.0 if names & {"compiler", "better"} else 1.0), "ok", 0.9 if names == {"half"} else 1.5

    _, trials = _outlined(200.0, [half, compiler, better], fate)
    keys = [key for key, _ in trials.seen]
    assert keys.index("half + better") < keys.index("better")
    assert "half + compiler" not in keys and keys[-1] == "compiler", "what is predicted slower comes last"


def test_what_is_left_of_the_budget_goes_to_what_is_predicted_to_be_about_as_fast() -> None:
    """Before a step that is predicted to gain more than that is dropped, where each needs a compiler."""
    half, compiler = _candidate("half", "precision", 0.0), _candidate("compiler", "compile", 10.0)
    wrapped, other = _candidate("wrapped", "compile", 14.0, 1.51), _candidate("other", "compile", 10.0, 1.4)

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        fewer = against is not None and names < set(against.plan.names)
        return 11.0, "ok", 0.8 if fewer or "other" in names else 1.2

    found, trials = _outlined(200.0, [half, compiler, wrapped, other], fate)
    keys = [key for key, _ in trials.seen]
    assert keys == ["half", "half + compiler", "half + wrapped", "half + other", "wrapped"], keys
    assert set(found.best.plan.steps) == {half, wrapped}


def test_a_bold_stack_without_setup_comes_after_the_cautious_one_too() -> None:
    cast, graph = _candidate("cast", "precision", 0.0), _candidate("graph", "compile", 1.0)
    bold = _candidate("bold", "precision", 0.0, 2.0, "aggressive")

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        fewer = against is not None and names < set(against.plan.names)
        return 2.0, "value" if "bold" in names else "ok", 0.7 if fewer else 1.5

    found, trials = _outlined(90.0, [cast, graph, bold], fate)
    assert [key for key, _ in trials.seen][:2] == ["cast + graph", "bold + graph"]
    assert set(found.best.plan.steps) == {cast, graph}


@pytest.mark.parametrize("stopped", [False, True])
def test_what_is_quick_does_not_hide_a_compiler_that_promises_more(stopped: bool) -> None:
    """Its set-up makes it worth a little less than the captured graph, which was bought before."""
    graph, compiler = _candidate("graph", "compile", 0.0, 1.3), _candidate("compiler", "compile", 30.0, 1.6)
    cast = _candidate("cast", "precision", 0.0)

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        fewer = against is not None and names < set(against.plan.names)
        if "compiler" in names:
            return (1e9 if stopped else 25.0), "ok", 0.7 if fewer else 1.5
        return 1.0, "ok", 0.7 if fewer else 1.5

    found, trials = _outlined(90.0, [graph, compiler, cast], fate)
    assert [key for key, _ in trials.seen][:2] == ["cast + graph", "cast + compiler"]
    assert set(found.best.plan.steps) == {cast, graph if stopped else compiler}
    slow_model, trials = _outlined(90.0, [graph, compiler, cast], fate, latency=1.0)
    assert trials.seen[0][0] == "cast + compiler"
    assert set(slow_model.best.plan.steps) == {cast, graph if stopped else compiler}


def test_a_compiler_that_costs_more_company_than_it_promises_does_not_take_a_place() -> None:
    graph, kernel = _candidate("graph", "compile", 0.0, 1.3), _candidate("kernel", "kernels", 0.0, 1.2)
    variant = Variant("compiler", predicted_gain=1.35, setup_seconds=5.0)
    alone = Candidate(
        variant, "compile", "test", "compiler", make=lambda: None, conflicts=frozenset({"kernel"})
    )
    found, trials = _outlined(
        120.0, [graph, kernel, alone], lambda names, against: (1.0, "ok", 1.5), latency=1.0
    )
    assert trials.seen[0][0] == "kernel + graph"


def test_a_compiler_that_is_not_worth_its_setup_leaves_the_place_to_what_is_quick() -> None:
    graph, compiler = _candidate("graph", "compile", 0.0, 1.3), _candidate("compiler", "compile", 80.0, 1.6)
    found, trials = _outlined(90.0, [graph, compiler], lambda names, against: (1.0, "ok", 1.5))
    assert trials.seen[0][0] == "graph"


def test_a_step_that_was_timed_with_and_without_it_is_not_dropped_again() -> None:
    kernel, compiler = _candidate("kernel", "kernels", 0.0), _candidate("compiler", "compile", 10.0)

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        return 1.0, "ok", 1.5 if against is None or len(names) == 2 else 0.7

    found, trials = _outlined(200.0, [kernel, compiler], fate)
    assert [key for key, _ in trials.seen] == ["kernel", "kernel + compiler", "compiler"]
    assert found.gains["compiler"] == pytest.approx(1.5)


def test_a_compiler_that_fails_in_company_only_is_kept_without_it() -> None:
    """What it takes to see that it is innocent is not thrown away."""
    half, compiler = _candidate("half", "precision", 0.0), _candidate("compiler", "compile", 10.0)

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        if names == {"half", "compiler"}:
            return 8.0, "failed", 1.0
        return (20.0, "ok", 2.0) if "compiler" in names else (1.0, "ok", 0.8)

    found, trials = _outlined(40.0, [half, compiler], fate)
    assert [key for key, _ in trials.seen] == ["half", "half + compiler", "compiler"]
    assert found.best.plan.steps == (compiler,)


def test_after_a_compiler_that_was_stopped_a_quicker_one_is_tried_without_what_loses() -> None:
    """There is time for one more: the step that loses without a compiler's help must not be in it."""
    half, compiler = _candidate("half", "precision", 0.0), _candidate("compiler", "compile", 10.0)
    variant = Variant("quicker", predicted_gain=1.2, setup_seconds=2.0)
    quicker = Candidate(variant, "compile", "test", "quicker", make=lambda: None)

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        if "compiler" in names:
            return 1e9, "ok", 1.0
        return 1.0 + 2.0 * ("quicker" in names), "ok", 1.1 if names == {"quicker"} else 0.8

    found, trials = _outlined(40.0, [half, compiler, quicker], fate)
    assert [key for key, _ in trials.seen[:3]] == ["half", "half + compiler", "quicker"]
    assert found.best.plan.steps == (quicker,)


def test_what_hangs_in_a_stack_without_setup_is_found_and_the_others_are_kept() -> None:
    hanging, good = _candidate("hanging", "kernels", 0.0), _candidate("good", "layout", 0.0)
    compiler = _candidate("compiler", "compile", 10.0)

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        seconds = 1e9 if "hanging" in names else 11.0 if "compiler" in names else 1.0
        return seconds, "ok", 0.7 if against is not None and names < set(against.plan.names) else 1.5

    found, trials = _outlined(200.0, [hanging, good, compiler], fate)
    assert set(found.best.plan.steps) == {good, compiler}
    assert [(entry.name, entry.rule) for entry in found.rejected] == [("hanging", "deadline")]
    assert trials.now < 100.0


def test_what_is_replaced_together_with_another_step_is_tried_in_place_before_much_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bold stack has another compiler, too: which of the two made it faster is not known."""
    half, bold = _candidate("half", "precision", 0.0), _candidate("bold", "precision", 0.0, 1.9, "aggressive")
    quick, compiler = _candidate("quick", "compile", 1.0, 1.1), _candidate("compiler", "compile", 45.0)
    seconds = {"quick": 2.0, "compiler": 45.0}
    true = {"half": 2.0, "bold": 1.6, "quick": 1.1, "compiler": 1.5}

    def speed(names: set[str]) -> float:
        return math.prod(true[name] for name in names)

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        before = set(against.plan.names) if against is not None else set()
        return 1.0 + sum(seconds.get(name, 0.0) for name in names), "ok", speed(names) / speed(before)

    monkeypatch.setattr(Ledger, "_crowds", lambda ledger, best: 0)
    found, trials = _outlined(120.0, [half, bold, quick, compiler], fate)
    keys = [key for key, _ in trials.seen]
    assert keys[0] == "half + quick" and "bold + compiler" in keys, keys
    assert "half + compiler" in keys[keys.index("bold + compiler") :] and "compiler" not in keys, keys
    assert set(found.best.plan.steps) == {half, compiler}


@pytest.mark.parametrize("phase", ["kernels", "shapes"])
def test_what_makes_no_difference_without_a_compiler_is_tried_beside_it(phase: Phase) -> None:
    """Other shapes are dropped all the same: with them, a compiler is set up again."""
    step, quick = _candidate("step", phase, 0.0, 1.1), _candidate("quick", "compile", 1.0, 1.2)
    compiler = _candidate("compiler", "compile", 30.0, 1.3)

    def speed(names: set[str]) -> float:
        compiled = 1.5 if "compiler" in names else 1.2 if "quick" in names else 1.0
        return compiled * (1.1 if {"step", "compiler"} <= names else 1.0)

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        before = set(against.plan.names) if against is not None else set()
        return 31.0 if "compiler" in names else 2.0, "ok", speed(names) / speed(before)

    found, trials = _outlined(90.0, [step, quick, compiler], fate)
    keys = [key for key, _ in trials.seen]
    assert (keys[0].split(" + ").count("step"), keys[1]) == (1, "quick"), keys
    assert set(found.best.plan.steps) == ({step, compiler} if phase == "kernels" else {compiler}), keys


@pytest.mark.parametrize(("setup", "fuel"), [(500.0, None), (30.0, 2)])
def test_what_makes_no_difference_is_dropped_where_no_compiler_comes(setup: float, fuel: int | None) -> None:
    """One that there is no time for, or no fuel, stays open to the end; the plan does not wait for it."""
    step, quick = _candidate("step", "kernels", 0.0, 1.1), _candidate("quick", "runtime", 1.0, 1.2)
    compiler = _candidate("compiler", "compile", setup, 1.15)

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        before = set(against.plan.names) if against is not None else set()
        return 2.0, "ok", (1.2 if "quick" in names else 1.0) / (1.2 if "quick" in before else 1.0)

    found, trials = _outlined(90.0, [step, quick, compiler], fate, fuel=fuel)
    assert set(found.best.plan.steps) == {quick}, trials.seen
