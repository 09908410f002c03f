"""Where the commit finds its plan wrong the search goes on, with what was not to blame."""

from __future__ import annotations

import pytest
import torch

import bold_passes
import kpt
import mixed_models
import slow_models
from cached_recipes import recipes
from fingerprints import optimized
from kpt.judge.verdict import passed
from kpt.specs import KernelSpec, PolicySpec
from kpt.transaction import gate, going_on
from kpt.transaction.budget import Budget
from kpt.transaction.going_on import Refusal
from kpt.transaction.ledger import Ledger
from kpt.transaction.outcome import Outcome
from kpt.transaction.plan import Plan
from told_trials import FASTER, Trials, candidate

BOLD = PolicySpec("Bold", entry="bold_passes:HalfUntilTheCommit", compute_dtype="bfloat16")
BOLDER = PolicySpec("Bold", entry="bold_passes:BoldUntilTheCommit", level="aggressive", compute_dtype="int8")
CAUTIOUS = PolicySpec("Cautious", entry="bold_passes:Cautious", compute_dtype="bfloat16")


def test_without_its_bold_step(wobbly):
    offered = [slow_models.plugin(slow_models.DirectScale, policies=[BOLD])]
    model, example = mixed_models.mixed(rounds=200), torch.randn(64, 64)
    expected = model(example)
    optimized(model, example, plugins=offered, level="production", budget=30.0, cache=True)
    receipt = kpt.report(model)
    assert [entry.name for entry in receipt.accepted] == ["DirectScale:direct"], receipt
    assert [(entry.name, entry.rule) for entry in receipt.rejected] == [("Bold:wobbly", wobbly)]
    (note,) = [note for note in receipt.notes if "went on" in note]
    assert f"({wobbly})" in note and note.endswith("without Bold:wobbly")
    first, *_, last = [(trial["plan"], trial["rule"]) for trial in receipt.trials]
    assert "Bold:wobbly" in first[0] and first[1] == "ok" and last == (["DirectScale:direct"], "ok")
    assert torch.equal(model(example), expected)
    kpt.restore(model)
    optimized(model, example, plugins=offered, level="production", budget=30.0, cache=True)
    again = kpt.report(model)
    assert not again.searched and [e.name for e in again.accepted] == ["DirectScale:direct"]


def test_from_the_plan_that_was_kept_beneath(wobbly):
    """That was overtaken before what is faster than one of its steps was tried."""
    offered = [slow_models.plugin(bold_passes.TwoWays, policies=[CAUTIOUS, BOLDER])]
    model, example = mixed_models.mixed(rounds=200), torch.randn(64, 64)
    expected = model(example)
    optimized(model, example, plugins=offered, level="aggressive", budget=60.0)
    receipt = kpt.report(model)
    assert {entry.name for entry in receipt.accepted} == {"Cautious:half", "TwoWays:all"}, receipt
    rules = {entry.name: entry.rule for entry in receipt.rejected}
    assert rules == {"Bold:wobbly": wobbly, "TwoWays:halfway": "slower"}
    (note,) = [note for note in receipt.notes if "went on" in note]
    assert f"({wobbly})" in note and note.endswith("without Bold:wobbly")
    assert not any("overtaken" in note for note in receipt.notes)
    plans = [trial["plan"] for trial in receipt.trials]
    beneath, refused = ["Cautious:half", "TwoWays:halfway"], ["Bold:wobbly", "TwoWays:all"]
    assert [set(plan) for plan in plans].count(set(beneath)) == 1, "it was alive, and is not tried again"
    assert {frozenset(beneath), frozenset(refused)} <= {frozenset(plan) for plan in plans}
    assert torch.allclose(model(example), expected, atol=0.05)


def test_where_there_is_no_time_for_it_a_larger_budget_searches(wobbly, monkeypatch):
    """That nothing pays was not found out, and must not be remembered."""
    offered = [slow_models.plugin(slow_models.DirectScale, policies=[BOLD])]
    model, example = mixed_models.mixed(rounds=200), torch.randn(64, 64)
    after = going_on.after

    def late(ledger, refusals):
        ledger.budget.seconds = ledger.budget.spent() + 0.01
        return after(ledger, refusals)

    with monkeypatch.context() as patch:
        patch.setattr(going_on, "after", late)
        kpt.optimize(model, example, plugins=offered, level="production", budget=30.0)
    receipt = kpt.report(model)
    assert not receipt.optimized and "final judgement" in receipt.reason
    rules = {entry.name: entry.rule for entry in receipt.rejected}
    assert rules == {"Bold:wobbly": wobbly, "DirectScale:direct": "budget"}
    assert recipes() == []
    bold_passes.BoldUntilTheCommit.error = 0.0
    optimized(model, example, plugins=offered, level="production", budget=60.0, cache=True)
    assert kpt.report(model).searched and kpt.report(model).optimized


def test_kernels_are_judged_alone_once(wobbly, monkeypatch):
    spec = KernelSpec(
        op="rms_norm", name="right", entry="slow_kernels:right", compile_safe=True, predicted_gain=2.0
    )
    offered = [slow_models.plugin(kernels=[spec], policies=[BOLD])]
    judged: list[str] = []
    monkeypatch.setattr(gate, "judge", lambda kernel, trials: judged.append(kernel.name) or passed())
    model, example = mixed_models.mixed(rounds=200), torch.randn(64, 64)
    kpt.optimize(model, example, plugins=offered, level="production", budget=30.0, cache=False)
    assert any("went on" in note for note in kpt.report(model).notes)
    assert len(judged) == len(set(judged)) == 1


NAMES = (
    "bold",
    "bolder",
    "exact",
    "other",
    "kernel",
    "slower",
    "alone",
    "beside",
    "wrong",
    "late",
    "hopeless",
    "crowded",
)
LEVELS = {"bold": "production", "bolder": "aggressive"}


@pytest.fixture
def steps():
    return {name: candidate(name, "kernels", 0.0, level=LEVELS.get(name, "exact")) for name in NAMES}


@pytest.fixture
def ledger(steps):
    """A search that has rejected what is slower or wrong, beside the bold step and without it."""
    ledger = Ledger(Trials(), steps.values(), Budget(100.0, clock=lambda: 0.0))

    def trial(*names, rule, rival=None, over_eager=1.5):
        outcome = Outcome(Plan.of(steps[name] for name in names), rule=rule, reason=rule)
        outcome.rival, outcome.over_eager = rival and Plan.of([steps[rival]]), over_eager
        ledger.tried[outcome.plan.key] = outcome
        return outcome

    ledger.reject_by(steps["slower"], trial("slower", rule="slower", rival="bold"))
    ledger.reject_by(steps["alone"], trial("alone", rule="slower"))
    ledger.reject_by(steps["hopeless"], trial("hopeless", rule="slower", rival="bold", over_eager=0.9))
    ledger.reject_by(steps["crowded"], trial("crowded", rule="memory", rival="bold"))
    ledger.reject_by(steps["beside"], trial("bold", "beside", rule="value"))
    ledger.reject_by(steps["wrong"], trial("wrong", rule="value", rival="bold"))
    ledger.reject(steps["late"], "deadline", "not tried: another was stopped")
    ledger.gated.add(steps["kernel"])
    ledger.pace, ledger._reserve = 2.0, 60.0
    return ledger


def still_open(ledger):
    return [step.name for step in ledger.open()]


def refused(ledger, steps, *plans):
    """As the commit does: each step of a refused plan that the next is without is rejected."""
    refusals = []
    for names, rule in plans:
        refusals.append(Refusal(Plan.of(steps[name] for name in names), rule, f"final: {rule}"))
    kept = [step for refusal in refusals[1:] for step in refusal.plan.steps]
    for number, refusal in enumerate(refusals):
        for step in refusal.plan.steps:
            if number or step not in kept:
                ledger.reject(step, refusal.rule, refusal.reason)
    return refusals


def test_what_was_not_to_blame_is_open_again(ledger, steps):
    new = going_on.after(ledger, refused(ledger, steps, (("bold", "exact"), "value")))
    assert still_open(new) == ["bolder", "exact", "other", "kernel", "slower", "beside", "crowded"]
    entries = {entry.name: entry.rule for entry in new.found.rejected}
    stays = {"alone": "slower", "hopeless": "slower", "wrong": "value", "late": "deadline"}
    assert entries == {**stays, "bold": "value"}
    assert sorted(new.tried) == ["alone", "hopeless", "wrong"]
    assert new.gated == {steps["kernel"]} and new.pace == 2.0
    assert new.time_for(89.0), "what the refused plan's commit would have taken is not kept for others"


def test_of_two_that_were_refused_the_bold_steps_of_both_are_gone(ledger, steps):
    plans = (("bolder", "exact", "kernel"), "value"), (("bold", "exact"), "slower")
    new = going_on.after(ledger, refused(ledger, steps, *plans))
    assert {"exact", "kernel", "other"} <= set(still_open(new))
    assert not {"bold", "bolder"} & set(still_open(new))
    assert [note.partition(";")[0] for note in new.found.notes] == [
        "the commit refused bolder + exact + kernel (value)",
        "the commit refused bold + exact (slower)",
    ]
    assert all(note.endswith("without bold, bolder") for note in new.found.notes)


def test_it_goes_on_twice_and_everything_offered_is_open_or_said_of(ledger, steps):
    """What failed beside a step that is refused later is open then; what was refused before stays so."""
    beside = Outcome(Plan.of([steps["exact"], steps["other"]]), rule="value", reason="value")
    ledger.reject_by(steps["other"], beside)
    once = going_on.after(
        ledger, refused(ledger, steps, (("bold", "exact"), "slower"), (("bolder",), "value"))
    )
    assert "other" not in still_open(once) and "exact" in still_open(once)
    twice = going_on.after(once, refused(once, steps, (("exact", "kernel"), "value")))
    entries = {entry.name: entry.rule for entry in twice.found.rejected}
    assert still_open(twice) == ["other", "slower", "beside", "crowded"]
    assert {"bold": "slower", "bolder": "value", "exact": "value"}.items() <= entries.items()
    assert sorted([*entries, *still_open(twice)]) == sorted(NAMES)


def kept_beneath(ledger, steps, *names, seconds=4.0):
    """What the commit would fall back on: found.best, once it has refused what overtook it."""
    best = Outcome(Plan.of(steps[name] for name in names), timing=FASTER, seconds=seconds)
    ledger.found.best = best
    return best


def test_what_was_slower_than_the_plan_beneath_stays_rejected(ledger, steps):
    refusals = refused(ledger, steps, (("bolder", "exact"), "value"))
    best = kept_beneath(ledger, steps, "bold", "kernel")
    than_best = Outcome(Plan.of([steps["other"]]), rule="slower", reason="slower")
    than_best.rival, than_best.over_eager = best.plan, 1.5
    ledger.reject_by(steps["other"], than_best)
    new = going_on.after(ledger, refusals)
    assert new.found.best is best and new.tried["bold + kernel"] is best
    assert {"bold", "kernel", "exact"} <= set(still_open(new))
    assert not {"bolder", "other"} & set(still_open(new))
    assert not new.time_for(95.0) and new.time_for(85.0), "the commit of the plan beneath keeps its time"


def test_the_plan_beneath_is_committed_where_there_is_nothing_to_try_beside_it_or_no_time(ledger, steps):
    refusals = refused(ledger, steps, (("bolder", "exact"), "value"))
    before = list(ledger.found.rejected)
    kept_beneath(ledger, steps, "bold", "kernel", seconds=61.0)
    assert going_on.after(ledger, refusals) is None and ledger.found.rejected == before
    only = Ledger(Trials(), [steps["bold"], steps["bolder"]], Budget(100.0, clock=lambda: 0.0))
    refusals = refused(only, steps, (("bolder",), "value"))
    kept_beneath(only, steps, "bold")
    assert going_on.after(only, refusals) is None


@pytest.mark.parametrize("rule", ["slower", "deadline", "no-effect"])
def test_it_does_not_where_only_the_clock_refused(ledger, steps, rule):
    before = [entry.name for entry in ledger.found.rejected]
    assert going_on.after(ledger, refused(ledger, steps, (("bold", "exact"), rule))) is None
    assert [entry.name for entry in ledger.found.rejected] == [*before, "bold", "exact"]
    assert going_on.after(ledger, []) is None


def test_it_does_not_where_the_clock_must_not_choose_or_nothing_is_left(ledger, steps):
    ledger.fixed = True
    assert going_on.after(ledger, refused(ledger, steps, (("bold",), "value"))) is None
    only = Ledger(Trials(), [steps["bold"]], Budget(100.0, clock=lambda: 0.0))
    assert going_on.after(only, refused(only, steps, (("bold",), "value"))) is None
    assert [entry.rule for entry in only.found.rejected] == ["value"]


def test_what_there_is_no_time_for_is_rejected_for_that(ledger, steps):
    ledger.budget = Budget(100.0, clock=iter([0.0, *[95.0] * 9]).__next__)
    assert going_on.after(ledger, refused(ledger, steps, (("bold", "exact"), "value"))) is None
    entries = {entry.name: entry for entry in ledger.found.rejected}
    late = {name for name, entry in entries.items() if entry.rule == "budget"}
    assert late == {"bolder", "exact", "other", "kernel", "slower", "beside", "crowded"}
    assert entries["bold"].rule == "value" and "with no time left" in entries["exact"].reason


def test_a_trial_says_what_it_was_timed_against():
    class Quick(Trials):
        def run(self, plan, **options):
            return Outcome(plan, timing=FASTER, seconds=1.0)

    ledger = Ledger(Quick(), [], Budget(100.0))
    first = ledger.run(Plan.of([candidate("first", "kernels", 0.0)]))
    assert first.rival is None
    assert ledger.run(Plan.of([candidate("second", "kernels", 0.0)]), against=first).rival == first.plan
