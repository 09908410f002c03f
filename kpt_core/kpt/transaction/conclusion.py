"""The end of a run: commit what was found, or what lies beneath it; receipt, cache and trackers say so."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kpt import compiling, plugins
from kpt.error_text import described
from kpt.globalstate import results_kept
from kpt.transaction import memory, recipe
from kpt.transaction.budget import BudgetSpent
from kpt.transaction.commit import Committed, commit
from kpt.transaction.events import emit
from kpt.transaction.going_on import Refusal
from kpt.transaction.plan import Candidate, Plan
from kpt.transaction.receipt import Entry, Receipt

if TYPE_CHECKING:
    from kpt.judge.timing import Timing
    from kpt.transaction.ledger import Found, Ledger
    from kpt.transaction.outcome import Outcome
    from kpt.transaction.plan import Proposals
    from kpt.transaction.request import Run
    from kpt.transaction.trial import Trials

#: Share of the budget that the last proof may go beyond it, and the most seconds: what was found is lost
#: where a machine that has become slower does not let it end.
_OVERTIME, _OVERTIME_MOST = 0.05, 5.0
#: Seconds that a tracker may take without a word in the receipt.
_MOMENT = 1.0


def commit_best(
    run: Run,
    trials: Trials,
    found: Found,
    *,
    timed: bool = True,
    instead: Callable[[Sequence[Refusal]], Ledger | None] = lambda refusals: None,
) -> Ledger | None:
    """Commit the best plan; where the final judgement refuses it, the one of a stricter level beneath it.

    But for a search that is to go on ``instead``, given the refusals so far: it is returned. What was refused
    is among the rejected of the receipt, and of ``found``.
    """
    refusals: list[Refusal] = []
    further: Ledger | None = None
    while further is None and (best := found.best) is not None:
        beneath, best.beneath = best.beneath, None
        try:
            run.committed, refusal, timing = _try(run, best, beneath, trials, timed=timed)
            if run.committed is None:
                _say(run, f"the commit refused {best.plan.key} ({refusal[0]}): {refusal[1]}", refusal[0])
            if run.committed is not None:
                if beneath is not None:
                    with trials.kept.state_kept():  # its undos run after the last look at the model
                        beneath.close()
                _describe(run, trials, found, run.committed, timing)
                run.receipt.notes.extend(
                    f"the commit refused {each.plan.key} ({each.rule}); committed is what it had overtaken"
                    for each in refusals
                )
                return None
            run.receipt.reason = refusal[1]
            refusals.append(Refusal(best.plan, *refusal))
            _refused(found, best, beneath, *refusal)
            found.best = beneath
            further = instead(refusals)
        except BaseException:
            if beneath is not None:
                beneath.close()
            raise
    run.receipt.rejected = found.rejected
    return further


def _try(
    run: Run, best: Outcome, beneath: Outcome | None, trials: Trials, *, timed: bool
) -> tuple[Committed | None, tuple[str, str], Timing | None]:
    """Commit ``best``, in a time that leaves enough for the commit of what is ``beneath`` it.

    Where nothing is, it may go a little beyond the budget.
    """
    _say(run, f"committing {best.plan.key}")
    kept = beneath.commit_seconds if beneath is not None else 0.0
    beyond = overtime(run) if beneath is None else 0.0
    committed: Committed | None = None
    try:
        with run.budget.overtime(beyond):
            left = run.budget.left()
            with run.budget.limit(max(left - kept, 0.5 * left)):
                committed, refusal, timing = commit(run.model, best, trials, timed=timed)
        return committed, refusal, timing
    except (BudgetSpent, compiling.DeadlinePassed):
        _undo(best, committed)
        return None, ("deadline", "the budget was spent before the final judgement ended"), None
    except BaseException:
        _undo(best, committed)
        raise


def overtime(run: Run) -> float:
    """Seconds beyond the budget that it may take to prove what is the last."""
    return min(_OVERTIME * run.budget.seconds, _OVERTIME_MOST)


def _say(run: Run, text: str, rule: str | None = None) -> None:
    facts = {"rule": rule} if rule is not None else {}
    emit("commit", text, **facts, seconds=run.budget.spent(), budget=run.budget.seconds)


def _undo(best: Outcome, committed: Committed | None) -> None:
    if committed is not None:
        committed.take_back(in_run=True)
    best.close()


def _refused(found: Found, best: Outcome, beneath: Outcome | None, rule: str, reason: str) -> None:
    """Reject what the commit of ``best`` refused: the steps that the plan ``beneath`` it does without.

    Gains that were measured in its company are not those of what is left.
    """
    kept = beneath.plan.steps if beneath is not None else ()
    again = {step.name for step in kept}
    found.rejected = [entry for entry in found.rejected if entry.name not in again]
    for step in best.plan.steps:
        gain = found.forget_gain(step.name)
        if step not in kept:
            found.rejected.append(Entry(step.name, step.phase, step.plugin, rule, reason, gain))
    if beneath is not None and len(kept) == 1:
        found.gain(kept[0].name, beneath.over_eager)


def _effect(behaviour: Any) -> str:
    """What a step tells of what it did to the model, if it does."""
    tell = getattr(behaviour, "effect", None)
    return str(tell()) if callable(tell) else ""


def _describe(run: Run, trials: Trials, found: Found, committed: Committed, timing: Timing | None) -> None:
    receipt, best = run.receipt, committed.outcome
    run.only_examples = trials.judgement.calls.only_examples
    receipt.status, receipt.reason = "optimized", ""
    applied = committed.applied.behaviours
    effects = {step: _effect(behaviour) for step, behaviour in applied}

    def reason(step: Candidate) -> str:
        why = effects.get(step) or step.variant.note or "right and faster"
        doubt = found.doubts.get(step.name)
        return f"{why} ({doubt})" if doubt else why

    receipt.accepted = [
        Entry(
            step.name,
            step.phase,
            step.plugin,
            "kept",
            reason(step),
            found.gains.get(step.name),
            dict(best.figures),
        )
        for step in best.plan.steps
    ]
    receipt.rejected = found.rejected
    receipt.setup_seconds = best.setup_seconds
    receipt.watched_tensors = committed.watch.tensors
    receipt.derived_bytes = memory.derived_bytes(run.model, committed.applied)
    receipt.patches = ["forward of the model"]
    if timing is not None:
        receipt.speedup, receipt.speedup_low, receipt.speedup_high = timing.ratio, timing.low, timing.high
        receipt.confidence = timing.confidence
        receipt.seconds_before, receipt.seconds_after = timing.baseline_seconds, timing.candidate_seconds
        receipt.kinds = [asdict(kind) for kind in timing.kinds]
    if trials.metric.before is not None:
        receipt.accuracy = {
            "before": trials.metric.before,
            "after": trials.metric.after.get(best.plan.key, float("nan")),
        }
    receipt.recipe_data = recipe.to_dict(
        best.plan,
        run.key,
        {
            "gains": found.gains,
            "doubts": found.doubts,
            "rejected": [entry.to_dict() for entry in found.rejected],
            "speedup": receipt.speedup,
            "budget": run.budget.seconds,
            "mixtures": run.known_mixtures,
        },
    )


def why_nothing(receipt: Receipt, proposals: Proposals) -> str:
    if not proposals.candidates:
        return "no plugin had anything to offer here"
    rules = [entry.rule for entry in receipt.rejected]
    total, slow, unfuelled = len(rules), rules.count("slower"), rules.count("fuel")
    late = rules.count("budget") + rules.count("deadline")
    wrong = total - slow - unfuelled - late
    counts = [f"{slow} not faster", f"{wrong} not right or not applicable"]
    counts += [f"{late} not tried to the end for lack of budget"] if late else []
    counts += [f"{unfuelled} beyond the fuel"] if unfuelled else []
    return f"of {total} variants none paid for itself: {', '.join(counts)}"


def store(run: Run, *, fixed: bool) -> None:
    """Keep what was found, nothing included: a second process need not search in vain.

    Where the plan is ``fixed`` a lack of time is kept as well: it must not decide differently next time.
    """
    receipt = run.receipt
    if receipt.recipe_data is None:
        rejected = [asdict(entry) for entry in receipt.rejected]
        receipt.recipe_data = recipe.to_dict(
            Plan(),
            run.key,
            {
                "reason": receipt.reason,
                "rejected": rejected,
                "budget": run.budget.seconds,
                "mixtures": [*run.known_mixtures, run.kinds],
            },
        )
    if not run.request.cache or run.request.plan is not None or run.keeps_recipe:
        return
    late = any(entry.rule in ("budget", "deadline") for entry in receipt.rejected)
    if late and not receipt.optimized and not fixed:
        return  # a longer budget may still find something
    kept = receipt.recipe_data
    if run.outpaced is not None and not receipt.optimized and not fixed:  # it pays on other calls than these
        mixtures = [*run.known_mixtures, *([] if run.untried else [run.kinds])]
        figures = {**run.outpaced.get("figures", {}), "mixtures": mixtures}
        kept = {**run.outpaced, "figures": figures}
    problem = recipe.write(run.key, kept)
    if problem is not None:
        receipt.notes.append(problem)


def track(run: Run) -> None:
    """Give the receipt to every tracker; one that raises is noted and harms nothing.

    The search is over, and its budget does not count what a tracker takes: where that is more than a moment,
    it is noted. What a tracker changes of torch's flags and of random states is put back and noted.
    """
    specs = {found.spec.name: found.spec for found in run.request.registry.specs("kpt_trackers")}
    for tracker in run.request.trackers:
        label = f"tracker {tracker!r}"
        started = time.perf_counter()
        with results_kept() as changed:
            try:
                if isinstance(tracker, str):
                    tracker = plugins.instantiate(specs[tracker].entry)
                tracker.record(run.receipt.to_dict())
            except (Exception, SystemExit) as error:  # noqa: BLE001 - tracking must never end a run
                run.receipt.notes.append(f"{label} failed: {described(error)}")
        seconds = time.perf_counter() - started
        if changed:
            run.receipt.notes.append(f"put back after {label} had changed it: {', '.join(changed)}")
        if seconds >= _MOMENT:
            run.receipt.notes.append(
                f"{label} took {seconds:.1f} s, which the budget of the search does not count"
            )
