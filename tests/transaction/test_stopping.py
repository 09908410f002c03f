"""How trials and plans end: undos that take long, and threads left behind."""

from __future__ import annotations

import gc
import types

import pytest
import torch

import kpt
import stopping_passes as stopping
from fingerprints import optimized
from kpt.transaction import applied, threads
from slow_models import DirectScale, net, plugin


def test_an_undo_of_a_trial_that_does_not_come_back_is_stopped(monkeypatch):
    monkeypatch.setattr(applied, "_UNDO_SECONDS", 0.1)
    model, example = net(), torch.randn(32, 16)
    kpt.optimize(model, example, plugins=[plugin(stopping.WrongAndUndoWaits)], budget=20.0, cache=False)
    name = "WrongAndUndoWaits:direct"
    assert set(kpt.report(model).notes) == {f"{name}: undo did not come back and was stopped"}


def test_an_undo_outside_of_trials_runs_to_its_end(monkeypatch):
    monkeypatch.setattr(applied, "_UNDO_SECONDS", 0.1)
    model, example = net(), torch.randn(32, 16)
    optimized(model, example, plugins=[plugin(stopping.UndoTakesLong)])
    stopping.UndoTakesLong.ended.clear()
    kpt.restore(model)
    assert stopping.UndoTakesLong.ended == [True] and kpt.report(model).notes == []
    optimized(model, example, plugins=[plugin(stopping.UndoTakesLong)])
    stopping.UndoTakesLong.ended.clear()
    del model
    gc.collect()
    assert stopping.UndoTakesLong.ended == [True]


def test_ctrl_c_in_one_undo_lets_the_others_run():
    undone = []
    plan = applied.Applied.__new__(applied.Applied)
    plan._threads = threads.StartedThreads()
    step = types.SimpleNamespace(name="step")

    def interrupted():
        undone.append("second")
        raise KeyboardInterrupt

    plan._undos = [(step, lambda: undone.append("first")), (step, interrupted)]
    plan.compiled, plan.undo_errors, plan.module = [], [], torch.nn.Identity()
    with pytest.raises(KeyboardInterrupt):
        plan.close()
    assert undone == ["second", "first"] and plan.module is None
    plan.close()
    assert undone == ["second", "first"]


@pytest.mark.parametrize("offered", [stopping.StartsAThread, stopping.StartsAPool], ids=["thread", "pool"])
def test_threads_that_a_rejected_trial_leaves_behind_are_named(offered):
    model, example = net(), torch.randn(32, 16)
    try:
        optimized(model, example, plugins=[plugin(offered, DirectScale)], budget=15.0)
        notes = kpt.report(model).notes  # one for each trial that it was part of
        assert notes
        for note in notes:
            assert f"{offered.__name__}:direct" in note.partition(": threads that it started still run")[0]
            assert "left-behind" in note
    finally:
        stopping.ended.set()


def test_threads_that_an_undo_ends_are_no_matter():
    model = net()
    optimized(model, torch.randn(32, 16), plugins=[plugin(stopping.EndsItsThread, DirectScale)], budget=15.0)
    assert kpt.report(model).notes == []


def test_the_monitor_of_a_progress_bar_is_not_a_plans():
    """It lives on for the next bar, whoever drew the first."""
    tqdm = pytest.importorskip("tqdm")
    started = threads.StartedThreads()
    monitor = tqdm.TMonitor(tqdm.tqdm, 10.0)
    try:
        started.look()
        assert monitor.is_alive() and started.left() == []
    finally:
        monitor.exit()
