"""Which compiler or stack a search tries first, and what takes a place in the plan."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kpt.specs import Variant
from kpt.transaction.ledger import Ledger
from kpt.transaction.plan import Candidate
from told_trials import candidate, outlined


def test_an_alternative_that_promises_much_comes_before_dropping_steps_that_need_a_compiler_each() -> None:
    half, compiler = candidate("half", "precision", 0.0, 1.2), candidate("compiler", "compile", 10.0)
    better = Candidate(
        Variant("better", predicted_gain=2.0, setup_seconds=60.0),
        "compile",
        "test",
        "better",
        make=lambda: None,
    )

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        return (11.0 if names & {"compiler", "better"} else 1.0), "ok", 0.9 if names == {"half"} else 1.5

    _, trials = outlined(200.0, [half, compiler, better], fate)
    keys = [key for key, _ in trials.seen]
    assert keys.index("half + better") < keys.index("better")
    assert "half + compiler" not in keys and keys[-1] == "compiler", "what is predicted slower comes last"


def test_what_is_left_of_the_budget_goes_to_what_is_predicted_to_be_about_as_fast() -> None:
    """Before a step that is predicted to gain more than that is dropped, where each needs a compiler."""
    half, compiler = candidate("half", "precision", 0.0), candidate("compiler", "compile", 10.0)
    wrapped, other = candidate("wrapped", "compile", 14.0, 1.51), candidate("other", "compile", 10.0, 1.4)

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        fewer = against is not None and names < set(against.plan.names)
        return 11.0, "ok", 0.8 if fewer or "other" in names else 1.2

    found, trials = outlined(200.0, [half, compiler, wrapped, other], fate)
    keys = [key for key, _ in trials.seen]
    assert keys == ["half", "half + compiler", "half + wrapped", "half + other", "wrapped"], keys
    assert set(found.best.plan.steps) == {half, wrapped}


def test_a_bold_stack_without_setup_comes_after_the_cautious_one_too() -> None:
    cast, graph = candidate("cast", "precision", 0.0), candidate("graph", "compile", 1.0)
    bold = candidate("bold", "precision", 0.0, 2.0, "aggressive")

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        fewer = against is not None and names < set(against.plan.names)
        return 2.0, "value" if "bold" in names else "ok", 0.7 if fewer else 1.5

    found, trials = outlined(90.0, [cast, graph, bold], fate)
    assert [key for key, _ in trials.seen][:2] == ["cast + graph", "bold + graph"]
    assert set(found.best.plan.steps) == {cast, graph}


@pytest.mark.parametrize("stopped", [False, True])
def test_what_is_quick_does_not_hide_a_compiler_that_promises_more(stopped: bool) -> None:
    """Its set-up makes it worth a little less than the captured graph, which was bought before."""
    graph, compiler = candidate("graph", "compile", 0.0, 1.3), candidate("compiler", "compile", 30.0, 1.6)
    cast = candidate("cast", "precision", 0.0)

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        fewer = against is not None and names < set(against.plan.names)
        if "compiler" in names:
            return (1e9 if stopped else 25.0), "ok", 0.7 if fewer else 1.5
        return 1.0, "ok", 0.7 if fewer else 1.5

    found, trials = outlined(90.0, [graph, compiler, cast], fate)
    assert [key for key, _ in trials.seen][:2] == ["cast + graph", "cast + compiler"]
    assert set(found.best.plan.steps) == {cast, graph if stopped else compiler}
    slow_model, trials = outlined(90.0, [graph, compiler, cast], fate, latency=1.0)
    assert trials.seen[0][0] == "cast + compiler"
    assert set(slow_model.best.plan.steps) == {cast, graph if stopped else compiler}


def test_a_compiler_that_costs_more_company_than_it_promises_does_not_take_a_place() -> None:
    graph, kernel = candidate("graph", "compile", 0.0, 1.3), candidate("kernel", "kernels", 0.0, 1.2)
    variant = Variant("compiler", predicted_gain=1.35, setup_seconds=5.0)
    alone = Candidate(
        variant, "compile", "test", "compiler", make=lambda: None, conflicts=frozenset({"kernel"})
    )
    found, trials = outlined(
        120.0, [graph, kernel, alone], lambda names, against: (1.0, "ok", 1.5), latency=1.0
    )
    assert trials.seen[0][0] == "kernel + graph"


def test_a_compiler_that_is_not_worth_its_setup_leaves_the_place_to_what_is_quick() -> None:
    graph, compiler = candidate("graph", "compile", 0.0, 1.3), candidate("compiler", "compile", 80.0, 1.6)
    found, trials = outlined(90.0, [graph, compiler], lambda names, against: (1.0, "ok", 1.5))
    assert trials.seen[0][0] == "graph"


def test_what_is_replaced_together_with_another_step_is_tried_in_place_before_much_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bold stack has another compiler, too: which of the two made it faster is not known."""
    half, bold = candidate("half", "precision", 0.0), candidate("bold", "precision", 0.0, 1.9, "aggressive")
    quick, compiler = candidate("quick", "compile", 1.0, 1.1), candidate("compiler", "compile", 45.0)
    seconds = {"quick": 2.0, "compiler": 45.0}
    true = {"half": 2.0, "bold": 1.6, "quick": 1.1, "compiler": 1.5}

    def speed(names: set[str]) -> float:
        return math.prod(true[name] for name in names)

    def fate(names: set[str], against: Any) -> tuple[float, str, float]:
        before = set(against.plan.names) if against is not None else set()
        return 1.0 + sum(seconds.get(name, 0.0) for name in names), "ok", speed(names) / speed(before)

    monkeypatch.setattr(Ledger, "_crowds", lambda ledger, best: 0)
    found, trials = outlined(120.0, [half, bold, quick, compiler], fate)
    keys = [key for key, _ in trials.seen]
    assert keys[0] == "half + quick" and "bold + compiler" in keys, keys
    assert "half + compiler" in keys[keys.index("bold + compiler") :] and "compiler" not in keys, keys
    assert set(found.best.plan.steps) == {half, compiler}


def test_what_costs_little_beside_the_best_comes_before_what_costs_much_in_its_place() -> None:
    """Of another shape a quick engine is set up again in seconds; another compiler promises no more."""
    engine = candidate("engine", "compile", 5.0, 2.5)
    offered = [engine, candidate("compiler", "compile", 20.0, 2.5), candidate("shapes", "shapes", 40.0, 1.03)]
    _, trials = outlined(120.0, offered, lambda names, against: (8.0, "ok", 1.2))
    assert [plan for plan, _ in trials.seen][:3] == ["engine", "engine + shapes", "compiler + shapes"]
