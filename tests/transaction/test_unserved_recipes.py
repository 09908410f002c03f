"""Recipes that do not serve: wrong, too slow here, stopped, or given by somebody."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable

import pytest
import torch

import kpt
from cached_recipes import EXAMPLE, PLUGINS, edited, recipes, run, steps
from fingerprints import optimized
from kpt import interruption
from kpt.judge.timing import Timing
from kpt.judge.verdict import Verdict
from kpt.transaction import commit, recipe, trial
from kpt.transaction.fresh_calls import FreshCalls
from kpt.transaction.judgement import Judgement
from slow_models import DirectScale, net, plugin


def test_a_recipe_is_judged_once_and_as_thoroughly_as_a_commit(cached, monkeypatch):
    """A search judges its best once more. Of one plan a second judgement would say what the first did."""
    judged: list[bool] = []
    draws = FreshCalls.draws

    def drawing(self: FreshCalls, *, touches_mask: bool, thorough: bool) -> list:
        judged.append(thorough)
        return draws(self, touches_mask=touches_mask, thorough=thorough)

    monkeypatch.setattr(FreshCalls, "draws", drawing)
    receipt, _ = run()
    assert not receipt.searched and receipt.optimized and judged == [True]
    shutil.rmtree(os.environ["KPT_CACHE_DIR"])
    judged.clear()
    receipt, _ = run()
    assert receipt.searched and judged.count(True) == 1 and judged[-1]


def test_a_recipe_that_is_wrong_where_only_a_commit_looks_is_forgotten(cached, monkeypatch):
    judge = Judgement.judge

    def strict(self: Judgement, applied: object, draws: list) -> Verdict:
        if len(draws) > 2:
            return Verdict(False, "value", "seen on many inputs")
        return judge(self, applied, draws)

    forgotten: list[object] = []
    monkeypatch.setattr(recipe, "forget", lambda key: forgotten.append(key))
    monkeypatch.setattr(Judgement, "judge", strict)
    monkeypatch.setattr(FreshCalls, "draws", _more_when_thorough(FreshCalls.draws))
    kpt.optimize(model := net(), EXAMPLE, plugins=PLUGINS, cache=True, budget=6.0)
    receipt = kpt.report(model)
    assert receipt.searched and not receipt.optimized
    assert any("did not hold (value: seen on many inputs)" in note for note in receipt.notes)
    assert len(forgotten) == 1 and steps(cached) == []  # what the search found then: nothing


def _more_when_thorough(draws: Callable[..., list]) -> Callable[..., list]:
    def drawing(self: FreshCalls, *, touches_mask: bool, thorough: bool) -> list:
        found = draws(self, touches_mask=touches_mask, thorough=thorough)
        return found * 2 if thorough else found[:2]

    return drawing


def slow_clock(committed: object, model: torch.nn.Module, trials: object) -> Timing:
    with torch.no_grad():
        model(EXAMPLE)
    return Timing(1.0, 0.9, 1.1, 1e-3, 1e-3, 8)


def stopped(*args: object, **options: object) -> object:
    raise interruption.DeadlinePassed


@pytest.mark.parametrize(
    ("target", "name", "replacement", "rule"),
    [
        (commit.Committed, "time", slow_clock, "slower"),
        (commit.Committed, "time", stopped, "deadline"),
        (trial.Trials, "_run", stopped, "deadline"),
    ],
    ids=["timed", "stopped at the end", "stopped in the trial"],
)
def test_a_veto_of_the_clock_is_kept_in_deterministic_mode(
    target, name, replacement, rule, deterministic, monkeypatch
):
    """Else the third process would have other bits than the second."""
    plugins = [plugin(DirectScale)]
    first, _ = run(plugins=plugins)
    assert first.searched
    with monkeypatch.context() as patch:
        patch.setattr(target, name, replacement)
        model = kpt.optimize(net(), EXAMPLE, plugins=plugins, budget=6.0)
    second = kpt.report(model)
    assert second.recipe == "hit" and not second.searched and not second.optimized
    assert [entry.rule for entry in second.rejected] == [rule]
    third = kpt.report(kpt.optimize(net(), EXAMPLE, plugins=plugins, budget=6.0))
    assert third.recipe == "hit" and not third.searched and not third.optimized
    assert third.reason == second.reason != ""
    assert [entry.rule for entry in third.rejected] == [rule]


@pytest.mark.parametrize(("budget", "searched"), [(6.0, True), (12.0, False)])
def test_a_recipe_that_was_stopped_is_not_lost_and_not_tried_for_ever(budget, searched, cached, monkeypatch):
    """On a machine that was busy it ran out of time: with more it may serve; with as little, one searches."""
    before = steps(cached)
    with monkeypatch.context() as patch:
        patch.setattr(trial.Trials, "_run", stopped)
        kpt.optimize(model := net(), EXAMPLE, plugins=PLUGINS, budget=6.0)
    second = kpt.report(model)
    assert not second.optimized and not second.searched and "could not be set up" in second.reason
    assert steps(cached) == before != []
    receipt, _ = run(budget=budget)
    assert receipt.searched is searched and receipt.optimized
    receipt, _ = run(budget=budget)
    assert not receipt.searched and receipt.optimized


def test_in_deterministic_mode_too_a_search_follows_a_plan_that_is_wrong(deterministic, monkeypatch):
    """Of the plan that was given, as after other weights were loaded; what is right of it stays."""
    first, _ = run(plugins=[plugin(DirectScale)])
    judge, wrong = Judgement.judge, [Verdict(False, "value", "with these weights")]
    monkeypatch.setattr(Judgement, "judge", lambda *given: wrong.pop() if wrong else judge(*given))
    second, _ = run(plugins=[plugin(DirectScale)])
    assert first.searched and second.searched and second.optimized


def test_a_plan_that_was_given_and_is_wrong_is_among_the_rejected(monkeypatch, tmp_path):
    kpt.save(optimized(net(), EXAMPLE, plugins=PLUGINS), tmp_path / "saved")
    wrong = Verdict(False, "value", "off", {"relative_error": 0.2})
    monkeypatch.setattr(Judgement, "judge", lambda *_: wrong)
    receipt = kpt.report(kpt.load(tmp_path / "saved", model=net(), plugins=PLUGINS))
    assert not receipt.optimized and not receipt.searched
    (entry,) = receipt.rejected
    assert (entry.name, entry.rule, entry.figures) == ("DirectScale:direct", "value", wrong.figures)


@pytest.mark.parametrize(("budget", "searched"), [(20.0, True), (5.0, False)])
def test_a_search_that_ran_out_of_time_is_repeated_with_more_only(budget, searched):
    run()
    (path,) = recipes()

    def ran_out(body: dict) -> None:
        assert body["figures"]["budget"] == 6.0
        body["figures"]["rejected"][0]["rule"] = "budget"

    edited(ran_out)(path)
    receipt, _ = run(budget=budget)
    assert receipt.searched is searched
    assert receipt.recipe == "hit" or "smaller budget" in receipt.recipe


def takes(seconds: float) -> None:
    """In pieces, between which it can be stopped."""
    for _ in range(round(seconds / 0.01)):
        time.sleep(0.01)


class TakesLong(DirectScale):
    """Takes a second to be set up, in which it can be stopped."""

    def apply(self, model: torch.nn.Module, variant: object) -> Callable[[], None]:
        takes(1.0)
        return super().apply(model, variant)  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", ["trial", "commit"])
def test_a_plan_that_a_larger_budget_found_outlives_runs_with_less(stage, monkeypatch):
    """The second run had removed it, and the third one had to search."""
    plugins = [plugin(TakesLong)]
    first, _ = run(plugins=plugins, budget=8.0)
    (path,) = recipes()
    before = steps(path)
    with monkeypatch.context() as patch:
        if stage == "commit":
            patch.setattr(commit.Committed, "time", lambda *_: takes(30.0))
        model = kpt.optimize(net(), EXAMPLE, plugins=plugins, budget=0.6 if stage == "trial" else 3.0)
    second = kpt.report(model)
    assert not second.optimized and not second.searched
    assert "found with budget=8" in second.reason and "larger budget" in second.reason
    assert [entry.rule for entry in second.rejected] == ["deadline"]
    assert steps(path) == before
    again = kpt.report(kpt.optimize(net(), EXAMPLE, plugins=plugins, budget=0.5))
    assert any("not tried: before, it could not be set up" in note for note in again.notes)
    assert steps(path) == before
    third, _ = run(plugins=plugins, budget=7.0)
    assert third.recipe == "hit" and not third.searched
    assert [entry.name for entry in third.accepted] == [entry.name for entry in first.accepted]
