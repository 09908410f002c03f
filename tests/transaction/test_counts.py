"""Numbers outside of tensors: a plan moves those that the model moves, and no others."""

from __future__ import annotations

import math
import types

import pytest
import torch

import kpt
from fingerprints import optimized
from kpt.transaction.counts import Counts, same_step, spelled
from kpt.transaction.fresh_calls import FreshCalls
from slow_models import DirectScale, SlowScale, plugin

TABLE = {"calls": 0, "others": 0}
HUGE = 1 << 1100


class Around(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slow = SlowScale(16)
        self.held = types.SimpleNamespace(steps=0, nothing=math.nan, mask=HUGE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.slow(x) + 0 * TABLE["others"] if self.held.mask else x


class CountsEach(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        TABLE["calls"] += 1
        return super().forward(x)


class CountsEachSecond(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.held.steps += 1
        TABLE["calls"] += self.held.steps % 2
        return super().forward(x)


class Moves(DirectScale):
    """Moves a number once for each call, beside what the model moves."""

    name, step = "others", 1

    def apply(self, model, variant):
        undo, forward = super().apply(model, variant), model.forward

        def moving(*args, **kwargs):
            TABLE[self.name] += self.step
            return forward(*args, **kwargs)

        model.forward = moving

        def back():
            model.__dict__.pop("forward", None)
            undo()

        return back


class TakesBack(Moves):
    name, step = "calls", -1


@pytest.fixture(autouse=True)
def fresh():
    TABLE.update(calls=0, others=0)


@pytest.mark.parametrize(
    ("cls", "made_by", "start", "says"),
    [
        (Around, Moves, 0, "TABLE['others'] by 1, the untouched model's by 0"),
        (CountsEachSecond, Moves, 0, "TABLE['others'] by 1, the untouched model's by 0"),
        (CountsEach, TakesBack, 0, "TABLE['calls'] by 0, the untouched model's by 1"),
        (CountsEach, TakesBack, 1 << 60, "TABLE['calls'] by 0, the untouched model's by 1"),
        (CountsEach, TakesBack, HUGE, "TABLE['calls'] by 0, the untouched model's by 1"),
    ],
)
def test_a_plan_that_counts_otherwise_is_rejected(cls, made_by, start, says):
    model, x = cls().eval(), torch.randn(8, 16)
    TABLE["calls"] = start
    kpt.optimize(model, x, plugins=[plugin(made_by)], budget=20.0, cache=False)
    entries = kpt.report(model).rejected
    assert [entry.rule for entry in entries] == ["global-state"]
    assert says.replace("TABLE", "") in entries[0].reason.replace("TABLE", ""), entries[0].reason


@pytest.mark.parametrize("cls", [Around, CountsEach, CountsEachSecond])
@pytest.mark.parametrize("start", [0, 1 << 60, HUGE, 0.5])
def test_a_plan_that_counts_as_the_model_does_is_kept(cls, start):
    TABLE["calls"] = start
    optimized(cls().eval(), torch.randn(8, 16), plugins=[plugin(DirectScale)])


def test_nothing_is_run_for_numbers_that_nobody_moves(monkeypatch):
    runs = []
    monkeypatch.setattr(Counts, "moved", lambda self, call: runs.append(call()) or {})
    optimized(Around().eval(), torch.randn(8, 16), plugins=[plugin(DirectScale)])
    assert not runs


def test_differences_are_exact_and_those_of_floats_up_to_rounding():
    model = CountsEach()
    counts = Counts(model)
    for start, step in ((1 << 53, 1), (HUGE, 1), (HUGE, HUGE), (0, True)):
        TABLE["calls"] = start
        before = counts.read()
        TABLE["calls"] += step
        assert list(counts.since(before).values()) == [step]
    TABLE["calls"] = HUGE
    before = counts.read()
    TABLE["calls"] = 0.5
    assert list(counts.since(before).values()) == [-math.inf]
    assert same_step(0.2 - 0.1, 0.1 + 0.2 - 0.2) and not same_step(0.1, 0.2)
    assert (
        same_step(math.nan, math.nan) and not same_step(HUGE, 1.0) and not same_step(1 << 60, (1 << 60) + 1)
    )
    assert spelled(-3) == "-3" and spelled(0.5) == "0.5" and spelled(-HUGE) == "-2**1100 or more"


class Refuses(Around):
    """Takes no other number of rows while ``refusing``."""

    refusing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(self).refusing and len(x) != 8:
            raise ValueError("eight rows are expected")
        return self.slow(x)


@pytest.mark.parametrize("at_the_end", [False, True])
def test_the_note_on_sizes_is_about_the_plan_that_was_committed(at_the_end, monkeypatch):
    draws = FreshCalls.draws

    def drawing(self, *, touches_mask, thorough):
        monkeypatch.setattr(Refuses, "refusing", thorough is at_the_end)
        try:
            return draws(self, touches_mask=touches_mask, thorough=thorough)
        finally:
            monkeypatch.setattr(Refuses, "refusing", False)

    monkeypatch.setattr(FreshCalls, "draws", drawing)
    model = Refuses().eval()
    optimized(model, torch.randn(8, 16), plugins=[plugin(DirectScale)], dynamic_shapes={"x": {0: "rows"}})
    assert ("only the examples' sizes were judged" in " ".join(kpt.report(model).notes)) is at_the_end
