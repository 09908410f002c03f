"""The first plan of a search: the stack of the best predictions that holds.

Where the whole stack may use up the budget and leave nothing it is bought in steps, each of which has to beat
the one before. What makes a stack fail is looked for, named, and left out of the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from kpt.transaction.ledger import QUICK, ratio
from kpt.transaction.plan import EXCLUSIVE, Candidate, Plan

if TYPE_CHECKING:
    from kpt.transaction.ledger import Ledger
    from kpt.transaction.outcome import Outcome

#: Steps of this level may be wrong, or slow to compile, where those of the other levels are not.
_BOLD = "aggressive"
#: Share of what is left of the budget up to which a plan without set-up is bought before all others,
_CHEAP = 0.1
#: and share of the budget that is kept at most to find one such step when the stacks fail.
_SPARE = 0.2
#: A set-up that takes this many times as long as another is of another kind.
_BY_FAR = 2.0
#: and one that is predicted to gain this many times as much promises more: predictions are rough.
_MORE = 1.1
#: Slow stacks have room where they would have it if set-ups took this many times what is expected.
_ROUGHLY = 1.3
#: Share of the budget below which no other stack is begun after one that was stopped.
_LATE = 0.2


def first(ledger: Ledger) -> Outcome | None:
    """The best stack that holds, or None.

    A compiler may not come back in time, and a stack that quantises may take long and then be wrong. So what
    needs no set-up is bought first where that is cheap, then what is cautious, then all. Where there is time
    for one of these two alone it is the bolder one, if that is seen to be right. A search that goes on has a
    best plan already, which they have to beat.
    """
    whole = _stack(ledger, ledger.open())
    best = ledger.found.best
    if best is None and ledger.slow(whole):
        if ledger.seconds_of_calls() < _CHEAP * ledger.budget.left():
            best = _holding(ledger, _quick_for(ledger.budget.seconds), best)
        if best is None:
            ledger.spare = _for_singles(ledger)
    if whole.level == _BOLD:
        at_once, best = _bold_at_once(ledger, best)
        if not at_once:
            best = _holding(ledger, _cautious, best)
    return _holding(ledger, _any, best)


def _bold_at_once(ledger: Ledger, best: Outcome | None) -> tuple[bool, Outcome | None]:
    """Whether there is time for one slow stack only and what is bold in it was seen right; and the best.

    Whether it is right shows without the compiler, in the time of a few calls, and mostly it is faster by
    itself, to be kept should the compiler not come back. What is wrong is rejected.
    """
    calls = ledger.seconds_of_calls()
    while True:
        whole = _stack(ledger, ledger.open())
        cautious = _stack(ledger, [c for c in ledger.open() if _cautious(c)])
        bold = [step for step in whole.steps if not _cautious(step)]
        bare = Plan.of(step for step in whole.steps if not ledger.slow(Plan.of([step])))
        if not bold or not ledger.slow(cautious) or not set(bold).issubset(bare.steps):
            return False, best
        one = _ROUGHLY * ledger.setup(whole) + 2.0 * calls
        if ledger.time_for(one + _ROUGHLY * ledger.setup(cautious)) or not ledger.time_for(one):
            return False, best
        outcome = ledger.run(bare, against=best)
        if outcome.accepted:
            ledger.spare = 0.0
            return True, ledger.supersede(best, outcome)
        outcome.close()
        if outcome.right:
            return True, best
        if outcome.culprit is not None:
            ledger.reject_by(outcome.culprit, outcome)
        elif outcome.judged_wrong and len(bold) == 1:
            company = bare.without(bold[0]).key if len(bare) > 1 else ""
            reason = f"in company of {company}: {outcome.reason}" if company else outcome.reason
            ledger.reject(bold[0], outcome.rule, reason, figures=outcome.figures, evidence=outcome)
        else:
            return False, best


def _stack(ledger: Ledger, candidates: list[Candidate]) -> Plan:
    """The stack of best predictions, with what is slow and promises more in place of what is quicker by far.

    What a set-up costs is a reason to buy the quick one first; beside it, it would hide the slow one.
    """
    plan = ledger.assembled(candidates)
    seconds = ledger.budget.seconds
    for step in plan.steps:
        if step.phase not in EXCLUSIVE:
            continue
        dearer = [c for c in candidates if not _quick(c, seconds) and _setup(c) >= _BY_FAR * _setup(step)]
        promising = {c for c in dearer if c.phase == step.phase and c.gain > _MORE * step.gain}
        if not promising:
            continue
        other = _stack(ledger, [c for c in candidates if c is not step])
        if any(c in promising for c in other.steps) and _promise(other) > _MORE * _promise(plan):
            return other
    return plan


def _promise(plan: Plan) -> float:
    """What the steps are predicted to gain together."""
    return math.prod(step.gain for step in plan.steps)


def _for_singles(ledger: Ledger) -> float:
    """Seconds to try what needs no set-up one by one, should no stack hold."""
    quick = [Plan.of([c]) for c in ledger.open() if _quick_for(ledger.budget.seconds)(c)]
    each = [ledger.seconds_of_calls() + ledger.setup(plan) for plan in quick]
    return min(sum(each), _SPARE * ledger.budget.seconds)


def _any(candidate: Candidate) -> bool:
    return True


def _cautious(candidate: Candidate) -> bool:
    return candidate.level != _BOLD


def _quick_for(budget: float) -> Callable[[Candidate], bool]:
    return lambda candidate: _cautious(candidate) and _quick(candidate, budget)


def _quick(candidate: Candidate, budget: float) -> bool:
    slow, seconds = _own_setup(candidate)
    return not slow or seconds < QUICK * budget


def _holding(ledger: Ledger, admitted: Callable[[Candidate], bool], best: Outcome | None) -> Outcome | None:
    """The first stack of the ``admitted`` candidates that holds and beats ``best``; else ``best``.

    Whatever makes a stack fail is dropped until one holds. Only what a stack adds to ``best`` can be at
    fault; a step of ``best`` that does not work in its company is left out of it and stays in ``best``. What
    takes longer to set up than there is time for is left out, and stays open.
    """
    known = best.plan.steps if best is not None else ()
    apart: dict[Candidate, Outcome] = {}
    late: set[Candidate] = set()
    while True:
        plan = _stack(ledger, [c for c in ledger.open() if admitted(c) and c not in apart and c not in late])
        added = [step for step in plan.steps if step not in known]
        if not added or ledger.failed(plan) is not None:
            return best
        if not ledger.time_for_plan(plan, best):
            if ledger.slow(plan):
                late.add(_dearest(added))
                continue
            if best is not None:
                return best
        outcome = ledger.run(plan, against=best)
        if outcome.accepted and outcome.applied is not None:
            ledger.spare = 0.0
            if best is not None:
                if len(added) == 1 and len(plan) == len(known) + 1:  # timed with it and without it
                    ledger.paid.add(added[0])
                    ledger.found.gain(added[0].name, ratio(outcome))
                for step in known if len(added) == 1 else ():  # else something else may have paid for it
                    if step not in plan.steps and step not in apart:
                        reason = f"{plan.key} without it gives {ratio(outcome):.2f}x of {best.plan.key}"
                        ledger.reject(step, "slower", reason)
            for step, failure in apart.items():
                ledger.reject_by(step, failure)
            return ledger.supersede(best, outcome)
        outcome.close()
        if outcome.right:
            # Final for one step among all others. What is slower in a part may be faster in the whole.
            if len(added) == 1 and admitted is _any:
                ledger.reject_by(added[0], outcome)
            return best
        if outcome.rule in ("budget", "deadline") and ledger.budget.left() < _LATE * ledger.budget.seconds:
            return best
        hung = outcome.rule == "deadline" and not ledger.slow(plan)
        if hung and best is None and len(added) > 1:
            return _one_by_one(ledger, added)
        if outcome.culprit is not None and outcome.culprit in known:
            apart[outcome.culprit] = outcome
        elif not _blame(ledger, plan, added, outcome):
            alone = _without_company(ledger, added, best)
            if alone is None or alone.rule == "slower":
                return best
            if alone.accepted:
                ledger.spare = 0.0
                return ledger.supersede(best, alone)
        if outcome.rule == "deadline" and best is None and _lost(ledger):
            return None  # without the compiler's help the rest is not faster together: one by one


def _lost(ledger: Ledger) -> bool:
    """Whether a stack was right and not faster."""
    return any(outcome.rule == "slower" for outcome in ledger.tried.values())


def _dearest(steps: list[Candidate]) -> Candidate:
    """The step that asks for the most set-up for what it is predicted to gain."""
    return max(steps, key=lambda step: (_setup(step) / max(step.gain - 1.0, 1e-3), step.phase == "shapes"))


def _blame(ledger: Ledger, plan: Plan, added: list[Candidate], outcome: Outcome) -> bool:
    """Reject which of the ``added`` steps made ``plan`` fail; False when none could be found at fault."""
    if outcome.culprit in added:
        ledger.reject_by(outcome.culprit, outcome)
        return True
    if len(added) == 1:
        ledger.reject_by(added[0], outcome)
        return True
    if outcome.rule == "deadline":
        if not ledger.slow(Plan.of(added)):
            return False  # nobody announced to be slow
        slowest = max(added, key=_own_setup)
        ledger.reject_by(slowest, outcome)
        if not _own_setup(slowest)[0]:
            return True  # it was not its set-up that took so long, which says nothing of the others
        # What announces as long a set-up would take the rest of the budget the same way.
        for other in ledger.open():
            if _own_setup(other) >= _own_setup(slowest) and (other in added or other not in plan.steps):
                reason = f"not tried: {slowest.name}, with no longer a set-up, was stopped"
                ledger.reject(other, "deadline", reason, evidence=outcome)
        return True
    # Quick ones only: to see whether a compiler is innocent costs as much as the next stack, which tells it.
    quick = [step for step in added if not ledger.slow(Plan.of([step]))]
    for step in quick:
        known = ledger.tried.get(Plan.of([step]).key)
        if known is not None and known.right:
            continue
        if not ledger.time_for(ledger.setup(Plan.of([step]))):
            return False  # no time to find out; they are tried one by one, as far as there is time
        alone = ledger.run(Plan.of([step]), timed=False)
        alone.close()
        if not alone.right:
            ledger.reject_by(step, alone)
            return True
    if quick != added:
        return False
    # Each is right alone, so it is their company that fails: leave the least promising one out.
    weakest = min(added, key=lambda step: step.gain)
    reason = f"in company of {plan.without(weakest).key}: {outcome.reason}"
    ledger.reject(weakest, outcome.rule, reason, evidence=outcome)
    return True


def _without_company(ledger: Ledger, added: list[Candidate], best: Outcome | None) -> Outcome | None:
    """The one step with a slow set-up among several, alone; None where there is no time or no such step.

    The others were found right alone. If it is right too, their company failed: the rest of the search tries
    them beside it one by one.
    """
    slow = [step for step in added if ledger.slow(Plan.of([step]))]
    if len(slow) != 1 or len(added) == 1:
        return None
    plan = Plan.of(slow)
    if ledger.failed(plan) is not None or not ledger.time_for_plan(plan, best):
        return None
    outcome = ledger.run(plan, against=best)
    if not outcome.accepted:
        outcome.close()
        ledger.reject_by(slow[0], outcome)
    return outcome


def _one_by_one(ledger: Ledger, steps: list[Candidate]) -> Outcome | None:
    """The fastest of ``steps`` alone, or None; those that do not come back, or are wrong, are rejected."""
    best: Outcome | None = None
    for step in steps:
        outcome = ledger.run(Plan.of([step]), among=4 * len(steps))
        if outcome.accepted and best is not None and ratio(outcome) <= ratio(best):
            ledger.supersede(outcome, best)
            continue
        if outcome.accepted:
            best = ledger.supersede(best, outcome)
            continue
        outcome.close()
        if not outcome.right:
            ledger.reject_by(step, outcome)
    return best


def _setup(candidate: Candidate) -> float:
    return candidate.variant.setup_seconds


def _own_setup(candidate: Candidate) -> tuple[bool, float]:
    """By whose set-up a stack was slow: longest last.

    Other shapes have none of their own: what they announce is that a compiler beside them is set up twice.
    """
    seconds = candidate.variant.setup_seconds
    return seconds > 0.0 and candidate.phase != "shapes", seconds
