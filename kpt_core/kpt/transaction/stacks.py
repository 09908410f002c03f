"""The first plan of a search: the stack of the best predictions that holds.

Where the whole stack may use up the budget and leave nothing it is bought in steps, each of which has to beat
the one before. What makes a stack fail is looked for, named, and left out of the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kpt.transaction.plan import Candidate, Plan

if TYPE_CHECKING:
    from kpt.transaction.ledger import Ledger
    from kpt.transaction.trial import Outcome

#: Steps of this level may be wrong, or slow to compile, where those of the other levels are not.
_BOLD = "aggressive"
#: Share of the budget up to which a set-up is no risk.
_QUICK = 0.02
#: Calls of the model that a trial makes, about, to judge and to time a plan; the clock decides when to stop.
_CALLS = 40
#: Share of what is left of the budget up to which a plan without set-up is bought before all others.
_CHEAP = 0.1


def first(ledger: Ledger) -> Outcome | None:
    """The best stack that holds, or None.

    A compiler may not come back in time, and a stack that quantises may take long and then be wrong. So what
    needs no set-up is bought first where that is cheap, then what is cautious, then all.
    """
    whole = ledger.assembled(ledger.open())
    if ledger.fixed or sum(map(_setup, whole.steps)) < _QUICK * ledger.budget.seconds:
        return _holding(ledger, _any, None)
    best: Outcome | None = None
    if 1.0 + _CALLS * ledger.trials.observation.baseline_seconds < _CHEAP * ledger.budget.left():
        best = _holding(ledger, _quick_for(ledger.budget.seconds), best)
    if whole.level == _BOLD:
        best = _holding(ledger, _cautious, best)
    return _holding(ledger, _any, best)


def _any(candidate: Candidate) -> bool:
    return True


def _cautious(candidate: Candidate) -> bool:
    return candidate.level != _BOLD


def _quick_for(budget: float) -> Callable[[Candidate], bool]:
    def quick(candidate: Candidate) -> bool:
        slow, seconds = _own_setup(candidate)
        return _cautious(candidate) and (not slow or seconds < _QUICK * budget)

    return quick


def _holding(ledger: Ledger, admitted: Callable[[Candidate], bool], best: Outcome | None) -> Outcome | None:
    """The first stack of the ``admitted`` candidates that holds and beats ``best``; else ``best``.

    Whatever makes a stack fail is dropped until one holds. Only what a stack adds to ``best`` can be at
    fault; a step of ``best`` that does not work in its company is left out of it and stays in ``best``.
    """
    known = best.plan.steps if best is not None else ()
    apart: dict[Candidate, Outcome] = {}
    while True:
        plan = ledger.assembled(c for c in ledger.open() if admitted(c) and c not in apart)
        added = [step for step in plan.steps if step not in known]
        if not added or ledger.failed(plan) is not None:
            return best
        if best is not None and not ledger.time_for(ledger.cost(plan, best)):
            return best
        outcome = ledger.run(plan, against=best)
        if outcome.accepted and outcome.applied is not None:
            if best is not None:
                best.close()
            for step, failure in apart.items():
                ledger.reject_by(step, failure)
            return outcome
        outcome.close()
        if outcome.right:
            # Final for one step among all others. What is slower in a part may be faster in the whole.
            if len(added) == 1 and admitted is _any:
                ledger.reject_by(added[0], outcome)
            return best
        if outcome.rule in ("budget", "deadline") and ledger.budget.left() < 0.2 * ledger.budget.seconds:
            return best
        if outcome.culprit is not None and outcome.culprit in known:
            apart[outcome.culprit] = outcome
        elif not _blame(ledger, plan, added, outcome):
            return best


def _blame(ledger: Ledger, plan: Plan, added: list[Candidate], outcome: Outcome) -> bool:
    """Reject which of the ``added`` steps made ``plan`` fail; False when none could be found at fault."""
    if outcome.culprit in added:
        ledger.reject_by(outcome.culprit, outcome)
        return True
    if len(added) == 1:
        ledger.reject_by(added[0], outcome)
        return True
    if outcome.rule == "deadline":
        if not any(map(_setup, added)):
            return False  # nobody announced to be slow: they are tried one by one
        slowest = max(added, key=_own_setup)
        ledger.reject_by(slowest, outcome)
        if not _own_setup(slowest)[0]:
            return True  # it was not its set-up that took so long, which says nothing of the others
        # What announces as long a set-up would take the rest of the budget the same way.
        for other in ledger.open():
            if _own_setup(other) >= _own_setup(slowest) and (other in added or other not in plan.steps):
                reason = f"not tried: {slowest.name}, with no longer a set-up, was stopped"
                ledger.reject(other, "deadline", reason)
        return True
    # Quick ones first, and no further than the first that is at fault: to see whether a compiler is
    # innocent costs as much as the next whole stack, which tells the same.
    for step in sorted(added, key=_setup):
        if not ledger.time_for(_setup(step)):
            return False  # no time to find out; they are tried one by one, as far as there is time
        alone = ledger.run(Plan.of([step]), timed=False)
        alone.close()
        if not alone.right:
            ledger.reject_by(step, alone)
            return True
    # Each is right alone, so it is their company that fails: leave the least promising one out.
    weakest = min(added, key=lambda step: step.gain)
    ledger.reject(weakest, outcome.rule, f"in company of {plan.without(weakest).key}: {outcome.reason}")
    return True


def _setup(candidate: Candidate) -> float:
    return candidate.variant.setup_seconds


def _own_setup(candidate: Candidate) -> tuple[bool, float]:
    """By whose set-up a stack was slow: longest last.

    Other shapes have none of their own: what they announce is that a compiler beside them is set up twice.
    """
    seconds = candidate.variant.setup_seconds
    return seconds > 0.0 and candidate.phase != "shapes", seconds
