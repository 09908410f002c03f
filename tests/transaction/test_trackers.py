"""Trackers run after the search: what they change and take is told; Ctrl-C in one leaves nothing behind."""

from __future__ import annotations

import random
import time

import pytest
import torch

import kpt
from kpt.globalstate import results_kept
from kpt.transaction.dispatch import plan_of
from slow_models import DirectScale, net, plugin

PLUGINS = [plugin(DirectScale)]


class Rude:
    def record(self, receipt):
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        random.seed(3)


class Slow:
    def record(self, receipt):
        time.sleep(1.1)


class Interrupted:
    def record(self, receipt):
        raise KeyboardInterrupt


def tracked(tracker):
    model, example = net(), torch.randn(32, 16)
    with results_kept() as changed:
        kpt.optimize(model, example, plugins=PLUGINS, budget=20, cache=False, trackers=[tracker])
    return " ".join(kpt.report(model).notes), changed


def test_what_a_tracker_changes_of_torch_is_put_back_and_told():
    notes, changed = tracked(Rude())
    assert changed == [] and "Rude object" in notes
    for name in ("default dtype", "deterministic algorithms", "random state of Python"):
        assert name in notes


def test_what_a_tracker_takes_beyond_the_budget_is_told():
    notes, _ = tracked(Slow())
    assert "Slow object" in notes and "which the budget of the search does not count" in notes


def test_ctrl_c_in_a_tracker_leaves_the_model_as_it_was():
    model = net()
    with pytest.raises(KeyboardInterrupt):
        kpt.optimize(
            model, torch.randn(32, 16), plugins=PLUGINS, budget=20, cache=False, trackers=[Interrupted()]
        )
    assert plan_of(model) is None and "forward" not in model.__dict__
