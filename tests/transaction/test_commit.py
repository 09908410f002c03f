"""What is judged once more when a plan is committed."""

from __future__ import annotations

import time

import pytest
import torch

import kpt
import slow_models
from fingerprints import optimized
from kpt.judge import clock, spans
from kpt.transaction import events
from slow_models import DirectScale, fast_forward, net, plugin


class WrongFromTheCommitOn(DirectScale):
    """Right in every trial; half a percent off as soon as the transaction says that it commits."""

    factor = 1.0

    def replacement(self):
        return lambda self, x: fast_forward(self, x) * WrongFromTheCommitOn.factor


slow_models.WrongFromTheCommitOn = WrongFromTheCommitOn
WrongFromTheCommitOn.__module__ = "slow_models"


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_values_are_judged_again_at_the_commit_with_dropout_too(dropout):
    def turn(event):
        if event["kind"] == "commit":
            WrongFromTheCommitOn.factor = 1.005

    model, example = net(training=True, dropout=dropout), torch.randn(32, 16)
    try:
        with events.listen(turn):
            kpt.optimize(model, example, plugins=[plugin(WrongFromTheCommitOn)], budget=20.0, cache=False)
    finally:
        WrongFromTheCommitOn.factor = 1.0
    receipt = kpt.report(model)
    assert not receipt.optimized and "final judgement" in receipt.reason, receipt
    assert "value" in receipt.reason or "gradient" in receipt.reason


def test_a_right_plan_with_dropout_is_committed_with_the_figures_of_both_judgements():
    model = net(training=True, dropout=0.1)
    optimized(model, torch.randn(32, 16), plugins=[plugin(DirectScale)], budget=20.0)
    figures = kpt.report(model).accepted[0].figures
    assert "dropout_ratio" in figures and len(figures) > 1


def test_nothing_that_was_judged_without_dropout_stays_alive():
    from kpt.transaction import dispatch

    model = net(training=True, dropout=0.1)
    optimized(model, torch.randn(32, 16), plugins=[plugin(DirectScale)], budget=20.0)
    assert dispatch.plan_of(model).committed.outcome.quiet is None


def test_the_last_timing_ends_with_what_it_has_before_the_budget_does(monkeypatch):
    """Calls of other tenants' making may take a hundred times as long as before: a plan was lost for that."""
    paired, left = clock.paired, []

    def slower(*sides, **options):
        assert options["settle"] == spans.SETTLE_SECONDS
        if options.get("warmup") == 2 and committing:
            left.append(options["deadline"] - time.perf_counter())
        return paired(*sides, **options)

    committing: list[str] = []
    monkeypatch.setattr(clock, "paired", slower)
    with events.listen(lambda event: committing.append(event["kind"]) if event["kind"] == "commit" else None):
        optimized(net(), torch.randn(32, 16), plugins=[plugin(DirectScale)], budget=20.0)
    assert left and all(0.0 < seconds < 0.8 * 1.05 * 20.0 for seconds in left)


@pytest.mark.parametrize(("late", "committed"), [(0.0, True), (0.5, False)])
def test_a_commit_that_begins_late_may_end_a_little_after_the_budget(monkeypatch, late, committed):
    """On a machine that others had made slower a plan of 3x was lost for a second too much of judgement."""
    from kpt.transaction import commit

    judge_values = commit._judge_values

    def slow(outcome, trials):
        time.sleep(max(0.0, trials.budget.seconds * (1.0 + late) - trials.budget.spent()))
        return judge_values(outcome, trials)

    monkeypatch.setattr(commit, "_judge_values", slow)
    model, budget = net(), 8.0
    started = time.perf_counter()
    kpt.optimize(model, torch.randn(32, 16), plugins=[plugin(DirectScale)], budget=budget, cache=False)
    receipt, seconds = kpt.report(model), time.perf_counter() - started
    assert receipt.optimized is committed, receipt
    assert seconds < 1.1 * budget + 1.0
    if not committed:
        assert "before the final judgement ended" in receipt.reason
