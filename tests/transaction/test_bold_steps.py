"""What a level permits beyond the others must not cost what the others would have gained."""

from __future__ import annotations

import types

import pytest
import torch

import bold_passes
import fingerprints
import kpt
import mixed_models
import slow_models
from fingerprints import optimized
from kpt.specs import PolicySpec, Variant
from kpt.transaction import events, ledger, stacks
from kpt.transaction.budget import Budget
from kpt.transaction.fresh_calls import FreshCalls
from kpt.transaction.outcome import Outcome
from kpt.transaction.plan import Candidate, Plan

CAUTIOUS = PolicySpec("Cautious", entry="bold_passes:Cautious", compute_dtype="bfloat16")


def test_a_bold_step_that_never_ends_leaves_the_cautious_plan():
    policies = [
        CAUTIOUS,
        PolicySpec("Bold", entry="bold_passes:Bold", level="aggressive", compute_dtype="int8"),
    ]
    model, example = mixed_models.mixed(rounds=200), torch.randn(64, 64)
    offered = [slow_models.plugin(slow_models.DirectScale, policies=policies)]
    optimized(model, example, plugins=offered, level="aggressive", budget=12.0)
    receipt = kpt.report(model)
    assert "Cautious:half" in [entry.name for entry in receipt.accepted]
    (bold,) = [entry for entry in receipt.rejected if entry.name == "Bold:stuck"]
    assert bold.rule == "deadline"


def trials_and_receipt(bold, budget):
    """The plans that were tried, in order, with a half-precision policy, a bold one and a slow compiler."""
    half = PolicySpec("Half", entry="mixed_models:HalfWide", compute_dtype="bfloat16")
    policy = PolicySpec("Bold", entry=f"bold_passes:{bold}", level="aggressive", compute_dtype="int8")
    offered = [
        slow_models.plugin(policies=[half, policy]),
        slow_models.plugin(bold_passes.LongCompiled, phase="compile"),
    ]
    model, example, tried = mixed_models.mixed(rounds=200), torch.randn(64, 64), []

    def note(event):
        if event["kind"] == "trial" and event["text"].startswith("trying "):
            tried.append(event["text"].removeprefix("trying ").split(" + "))

    with events.listen(note):
        optimized(model, example, plugins=offered, level="aggressive", budget=budget)
    receipt = kpt.report(model)
    return tried, {entry.name for entry in receipt.accepted}, receipt


def test_where_one_compiled_stack_fits_the_bold_one_is_bought_after_its_steps_were_seen_to_be_right():
    tried, kept, _ = trials_and_receipt("BoldAndRight", budget=16.0)
    assert {"Bold:right", "LongCompiled:long"} <= kept
    assert tried.index(["Bold:right"]) < tried.index(["Bold:right", "LongCompiled:long"])
    assert ["Half:half", "LongCompiled:long"] not in tried


def test_where_one_compiled_stack_fits_and_the_bold_step_is_wrong_the_cautious_one_is_bought():
    tried, kept, receipt = trials_and_receipt("BoldAndWrong", budget=16.0)
    assert {"Half:half", "LongCompiled:long"} <= kept
    assert ["Bold:wrong"] in tried and ["Bold:wrong", "LongCompiled:long"] not in tried
    assert [entry.rule for entry in receipt.rejected if entry.name == "Bold:wrong"] == ["value"]


def test_where_both_compiled_stacks_fit_the_cautious_one_comes_first():
    tried, kept, _ = trials_and_receipt("BoldAndRight", budget=60.0)
    assert "LongCompiled:long" in kept
    both = [["Half:half", "LongCompiled:long"], ["Bold:right", "LongCompiled:long"]]
    assert tried.index(both[0]) < tried.index(both[1])


def test_where_the_commit_refuses_the_bold_plan_the_cautious_one_is_committed(wobbly):
    bold = PolicySpec(
        "Bold", entry="bold_passes:BoldUntilTheCommit", level="aggressive", compute_dtype="int8"
    )
    offered = [slow_models.plugin(slow_models.DirectScale, policies=[CAUTIOUS, bold])]
    model, example = mixed_models.mixed(rounds=200), torch.randn(64, 64)
    expected = model(example)
    said: list[dict] = []
    with events.listen(said.append):
        optimized(model, example, plugins=offered, level="aggressive", budget=30.0, cache=True)
    refusals = [event for event in said if event["kind"] == "commit" and "rule" in event]
    assert [event["rule"] for event in refusals] == [wobbly]
    assert "refused" in refusals[0]["text"] and "Bold:wobbly" in refusals[0]["text"]
    receipt = kpt.report(model)
    kept = {entry.name for entry in receipt.accepted}
    assert "Cautious:half" in kept and receipt.speedup > 1.0
    refused = {entry.name: entry for entry in receipt.rejected}
    assert refused["Bold:wobbly"].rule == wobbly and "final judgement" in refused["Bold:wobbly"].reason
    assert not kept & set(refused) and receipt.reason == ""
    assert any("what it had overtaken" in note for note in receipt.notes), receipt.notes
    assert torch.allclose(model(example), expected, atol=0.05)
    assert (
        receipt.accepted[0].figures and [s["source"] for s in receipt.recipe_data["steps"]].count("Bold") == 0
    )

    kpt.restore(model)
    bold_passes.BoldUntilTheCommit.error = 0.0
    optimized(model, example, plugins=offered, level="aggressive", budget=30.0, cache=True)
    assert {entry.name for entry in kpt.report(model).accepted} == kept
    assert not kpt.report(model).searched


def test_the_commit_of_a_bold_plan_leaves_the_one_beneath_the_time_for_its_own(monkeypatch):
    """It judges and times more than the trial did, whose time alone was too little for it."""
    bold = PolicySpec(
        "Bold", entry="bold_passes:BoldUntilTheCommit", level="aggressive", compute_dtype="int8"
    )
    limits: list[tuple[float, float]] = []
    limit = Budget.limit
    monkeypatch.setattr(
        Budget, "limit", lambda self, s=None: (limits.append((self.left(), s)), limit(self, s))[1]
    )
    committing: list[int] = []

    def note(event):
        if event["kind"] == "commit" and "rule" not in event:
            committing.append(len(limits))

    offered = [slow_models.plugin(slow_models.DirectScale, policies=[CAUTIOUS, bold])]
    model, example = mixed_models.mixed(rounds=200), torch.randn(64, 64)
    with events.listen(note):
        optimized(model, example, plugins=offered, level="aggressive", budget=30.0)
    left, given = limits[committing[0]]
    trials = kpt.report(model).trials
    judged = [t["seconds"] - t["setup_seconds"] for t in trials if "Cautious:half" in t["plan"]]
    assert any(left - given == pytest.approx(1.5 * each, abs=0.01) for each in judged), (left, given, judged)


class Alive:
    """What an outcome holds, as far as its closing is concerned."""

    closed = False

    def close(self):
        self.closed = True


def alive(name, level):
    step = Candidate(Variant(name), "precision", "test", name, make=lambda: None, level=level)
    return Outcome(Plan.of([step]), applied=Alive())


def test_an_outcome_keeps_the_stricter_one_beneath_it_until_it_is_closed_or_replaced_by_a_strict_one():
    exact, half, bold, bolder = (
        alive(level, level) for level in ("exact", "production", "aggressive", "aggressive")
    )
    applied = [each.applied for each in (exact, half, bold, bolder)]
    half.supersede(exact)
    bold.supersede(half)
    assert [each.closed for each in applied] == [True, False, False, False], "one beneath is enough"
    bolder.supersede(bold)
    assert [each.closed for each in applied] == [True, False, True, False] and bolder.beneath is half
    strict = alive("strict", "exact")
    strict.supersede(bolder)
    assert all(each.closed for each in applied) and strict.beneath is None


def test_a_plan_that_would_crowd_the_memory_is_not_kept_beneath(monkeypatch):
    monkeypatch.setattr(ledger, "free_memory", lambda device_type: 1000.0)
    bold = PolicySpec(
        "Bold", entry="bold_passes:BoldUntilTheCommit", level="aggressive", compute_dtype="int8"
    )
    offered = [slow_models.plugin(slow_models.DirectScale, policies=[CAUTIOUS, bold])]
    model, example = mixed_models.mixed(rounds=200), torch.randn(64, 64)
    optimized(model, example, plugins=offered, level="aggressive", budget=30.0)
    receipt = kpt.report(model)
    assert "Bold:wobbly" in {entry.name for entry in receipt.accepted}
    (note,) = [note for note in receipt.notes if "fall back" in note]
    assert note.startswith("Cautious:half") and "25% of the memory" in note


@pytest.mark.parametrize("short", [True, False])
def test_a_trial_that_runs_out_of_memory_is_tried_again_without_the_plan_beneath(short):
    half, bold, other = alive("half", "production"), alive("bold", "aggressive"), alive("other", "aggressive")
    held, tried = half.applied, []

    class CrowdedTrials:
        observation = types.SimpleNamespace(baseline_seconds=0.0, stochastic=False)

        def run(self, plan, **options):
            tried.append(plan.key)
            return Outcome(plan, rule="memory" if short and not held.closed else "ok")

    steps = [step for each in (half, bold, other) for step in each.plan.steps]
    book = ledger.Ledger(CrowdedTrials(), steps, Budget(60.0))
    bold.supersede(half)
    book.supersede(None, bold)
    assert bold.beneath is half
    assert book.run(other.plan, against=bold).accepted
    assert tried == [other.plan.key] * (2 if short else 1)
    assert held.closed is short and not bold.applied.closed
    assert bold.beneath is (None if short else half)
    assert [note.split(" ", 1)[0] for note in book.found.notes] == ([half.plan.key] if short else [])


def test_a_trial_that_runs_out_of_memory_with_nothing_beneath_is_not_tried_again():
    best, tried = alive("best", "exact"), []

    class Crowded:
        observation = types.SimpleNamespace(baseline_seconds=0.0, stochastic=False)

        def run(self, plan, **options):
            tried.append(plan.key)
            return Outcome(plan, rule="memory")

    other = alive("other", "aggressive").plan
    book = ledger.Ledger(Crowded(), [*best.plan.steps, *other.steps], Budget(60.0))
    book.supersede(None, best)
    assert book.run(other, against=best).rule == "memory"
    assert tried == [other.key] and book.found.notes == []


def test_ctrl_c_while_the_plan_beneath_is_undone_takes_the_committed_one_back():
    policies = [
        PolicySpec("Late", entry="bold_passes:InterruptedWhenClosed", compute_dtype="bfloat16"),
        PolicySpec("Bold", entry="bold_passes:BoldUntilTheCommit", level="aggressive", compute_dtype="int8"),
    ]

    def turn(event):
        bold_passes.InterruptedWhenClosed.committed = event["kind"] == "commit"

    model, example = mixed_models.mixed(rounds=200), torch.randn(64, 64)
    before = fingerprints.of_model(model)
    with events.listen(turn), pytest.raises(KeyboardInterrupt):
        kpt.optimize(
            model,
            example,
            plugins=[slow_models.plugin(slow_models.DirectScale, policies=policies)],
            level="aggressive",
            budget=30.0,
            cache=False,
        )
    assert not bold_passes.InterruptedWhenClosed.committed, "it was undone after the commit"
    assert fingerprints.of_model(model) == before


def test_what_lies_beneath_is_the_fastest_of_its_level():
    bold, slow, fast = alive("bold", "aggressive"), alive("slow", "exact"), alive("fast", "exact")
    bold.over_eager, slow.over_eager, fast.over_eager = 2.0, 1.05, 1.8
    bold.supersede(slow)
    bold.supersede(fast)
    assert bold.beneath is fast and slow.applied is None


@pytest.mark.parametrize("share", [0.01, 0.05])
def test_what_is_set_up_sooner_by_far_does_not_stand_for_a_compiler_that_promises_more(share):
    def step(name, phase, gain, seconds):
        variant = Variant(name, predicted_gain=gain, setup_seconds=seconds)
        return Candidate(variant, phase, "test", name, make=lambda: None)

    class Budget:
        seconds = 120.0

        def left(self):
            return 120.0

    captured, compiler = (
        step("captured", "compile", 1.15, share * 120.0),
        step("compiler", "compile", 1.4, 36.0),
    )
    wrapped = step("wrapped", "compile", 1.41, 43.0)
    for offered in ([captured, compiler], [captured, compiler, wrapped]):
        book = ledger.Ledger(None, offered, Budget())
        (chosen,) = stacks._stack(book, offered).steps
        assert chosen is compiler


def test_the_first_trial_of_a_bold_step_looks_at_bounds():
    """Where the commit would refuse it, at the end of a search that had built upon it."""
    bold = PolicySpec("Bold", entry="bold_passes:AtABound", compute_dtype="bfloat16")
    model, example = mixed_models.mixed(rounds=200), torch.randn(32, 64)
    kpt.optimize(
        model,
        example,
        dynamic_shapes={"x": {0: torch.export.Dim("rows", min=2, max=64)}},
        plugins=[slow_models.plugin(slow_models.DirectScale, policies=[bold])],
        level="production",
        budget=30.0,
        cache=False,
    )
    receipt = kpt.report(model)
    assert [entry.name for entry in receipt.accepted] == ["DirectScale:direct"], receipt
    assert {entry.name: entry.rule for entry in receipt.rejected} == {"Bold:bound": "size"}
    assert not any("commit" in note for note in receipt.notes)


def test_steps_that_passed_a_long_look_get_a_short_one_next_time(monkeypatch):
    looks = []
    draws = FreshCalls.draws

    def drawing(self, *, touches_mask, thorough):
        looks.append(thorough)
        return draws(self, touches_mask=touches_mask, thorough=thorough)

    monkeypatch.setattr(FreshCalls, "draws", drawing)
    offered = [slow_models.plugin(bold_passes.TwoWays, policies=[CAUTIOUS])]
    optimized(
        mixed_models.mixed(rounds=200), torch.randn(64, 64), plugins=offered, level="production", budget=30.0
    )
    *trials, commit = looks
    assert trials.count(True) == 1 and trials.count(False) >= 1 and commit
    looks.clear()
    optimized(
        mixed_models.mixed(rounds=200), torch.randn(64, 64), plugins=offered, level="exact", budget=30.0
    )
    *trials, commit = looks
    assert not any(trials) and commit, "what is exact is judged at length by the commit alone"
