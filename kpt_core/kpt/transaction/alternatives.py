"""What was left out of a plan, tried in place of what was chosen or beside it.

Most promising first. What is left of the budget in the end is given to what was thought to take longer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kpt.transaction.ledger import announced, ratio
from kpt.transaction.plan import Plan, excludes, worth

if TYPE_CHECKING:
    from kpt.transaction.ledger import Ledger
    from kpt.transaction.outcome import Outcome
    from kpt.transaction.plan import Candidate

#: What would come beside the chosen steps is not tried where it is predicted to gain less than this,
_WORTH = 1.02
#: nor what would come in place of one of them where it is predicted below this: predictions are rough.
HOPELESS = 0.75
#: Those that promise this much are tried before steps are dropped one by one, where that needs a set-up each.
PROMISING = 1.0
#: Seconds of calls within which an alternative has to give back what its set-up takes longer than that of
#: what it replaces or joins: processes that find the plan in the cache pay for most of it, too.
_REPAID = 600.0
#: Seconds within which such a process should be ready: what makes it later still, by more than a moment, has
#: to save this share of the time of calls.
_READY, _MOMENT, _LATE_GAIN = 20.0, 1.0, 0.1
#: A set-up that is expected to take this many times what is left is not begun,
_GAMBLE = 2.5
#: nor any where less than this share of the budget is left.
_GAMBLE_LEAST = 0.15
#: nor for less than this.
_GAMBLE_GAIN = 1.2


def tried(ledger: Ledger, best: Outcome, *, least: float = HOPELESS) -> Outcome:
    """Try what was left out in place of (or beside) what was chosen, most promising first.

    Those that promise less than ``least`` stay open, where they need a set-up, or would replace something.
    """

    def promise(candidate: Candidate) -> float:
        """Its predicted gain over what is there, less what the set-up of the plan costs of the budget."""
        plan = best.plan.with_(candidate)
        gain = _hope(candidate, best) * _together(_freed(ledger, candidate, plan, best))
        return gain / (1.0 + ledger.announced(plan) / ledger.budget.seconds)

    for candidate in sorted(ledger.open(), key=promise, reverse=True):
        if any(candidate is step for step in best.plan.steps):
            continue
        replaced = any(excludes(step, candidate) is not None for step in best.plan.steps)
        hope, plan = _hope(candidate, best), best.plan.with_(candidate)
        if ledger.fuel is not None and len(plan) > ledger.fuel:
            continue
        freed = _freed(ledger, candidate, plan, best)
        hope *= _together(freed)
        if replaced and least > HOPELESS and hope < HOPELESS:
            continue  # what it gives way to may yet be replaced itself
        if candidate.gain <= 1.0 or hope < (HOPELESS if replaced else _WORTH):
            ledger.reject(candidate, "slower", f"predicted {hope:.2f}x of what was chosen, not tried")
            continue
        if hope < least and ledger.slow(plan):
            continue
        known = ledger.failed(plan)
        if known is not None:
            ledger.reject_by(candidate, known)
            continue
        if not ledger.time_for_plan(plan, best):
            continue
        best = _in_place(ledger, candidate, plan, best, freed)
    return best


def _freed(ledger: Ledger, candidate: Candidate, plan: Plan, best: Outcome) -> list[Candidate]:
    """Kernels that can come beside ``candidate`` in ``plan`` and could not beside what that replaces.

    A compiler that does without kernels must not keep them from those that take them. Only those without
    a set-up.
    """
    found: list[Candidate] = []
    gone = [step for step in best.plan.steps if step not in plan.steps]
    for other in sorted(ledger.open(), key=lambda c: -c.gain):
        if not other.kernel or other is candidate or other.gain <= 1.0 or ledger.slow(Plan.of([other])):
            continue
        if ledger.fuel is not None and len(plan) >= ledger.fuel:
            break
        beside = all(excludes(step, other) is None for step in plan.steps)
        if beside and any(excludes(step, other) is not None for step in gone):
            if other.requires <= plan.provided:
                found.append(other)
                plan = plan.with_(other)
    return found if ledger.failed(plan) is None else []


def _in_place(
    ledger: Ledger, candidate: Candidate, plan: Plan, best: Outcome, freed: Sequence[Candidate] = ()
) -> Outcome:
    """The better of ``best`` and ``plan``, which has ``candidate`` beside or in place of its steps.

    What that has ``freed`` comes along, unless the plan is better without.
    """
    replaced = [step for step in best.plan.steps if step not in plan.steps]
    outcome = ledger.run(Plan.of([*plan.steps, *freed]), against=best)
    if freed and _their_fault(outcome, freed):
        outcome.close()
        if not ledger.time_for_plan(plan, best):
            return best  # and what is wrong with the kernels' company is not said of the candidate
        outcome, freed = ledger.run(plan, against=best), ()
    if not outcome.accepted:
        outcome.close()
        ledger.reject_by(candidate, outcome)
        return best
    if too_long := _too_long(ledger, outcome, best):
        beside = f" with {', '.join(step.name for step in freed)}" if freed else ""
        outcome.close()
        detail = f"{ratio(outcome):.2f}x{beside}, which does not give back {too_long}"
        ledger.reject(candidate, "slower", detail, None if freed else ratio(outcome))
        return best
    for step in replaced:
        ledger.reject(step, "slower", f"{candidate.name} in its place gives {ratio(outcome):.2f}x")
        ledger.found.forget_gain(step.name)
    if not freed:  # else it is not known which of them gains what
        ledger.found.gain(candidate.name, ratio(outcome))
        if ledger.paid.issuperset(replaced):
            ledger.paid.add(candidate)
    return ledger.supersede(best, outcome)


def _longer(ledger: Ledger, plan: Plan, than: Plan) -> float:
    """Seconds that ``plan`` is expected to take longer to set up, once, at the pace of set-ups here.

    What trials took says less: some are answered from a compiler's cache.
    """
    return ledger.pace * (announced(plan) - announced(than))


def _too_long(ledger: Ledger, outcome: Outcome, best: Outcome) -> str:
    """What of its set-up the gain of ``outcome`` over ``best`` does not give back soon enough; "" if all is.

    For less memory it may take any time.
    """
    timing = outcome.timing
    if timing is None or ledger.trials.observation.objective == "memory":
        return ""
    gained = max(0.0, 1.0 - 1.0 / (timing.total or timing.ratio))
    if (longer := _longer(ledger, outcome.plan, best.plan)) > gained * _REPAID:
        return f"within {_REPAID / 60:.0f} minutes of calls the {longer:.0f} s that its set-up takes longer"
    ready, before = ledger.ready(outcome), ledger.ready(best)
    late = ready - max(before, _READY)
    if late > _MOMENT and gained < _LATE_GAIN:
        return (
            f"the {late:.0f} s by which a later process would be ready after {max(before, _READY):.0f} s: "
            "a tenth of the time of calls would"
        )
    return ""


def gamble(ledger: Ledger, best: Outcome | None) -> Outcome | None:
    """Give what is left to the step that promises most of those whose set-up was expected to take longer.

    Expectations are rough, and nothing else is left to do.
    """
    left = ledger.budget.left()
    waiting: list[tuple[Candidate, Plan]] = []
    for candidate in ledger.open():
        if (candidate.gain if best is None else _hope(candidate, best)) < _GAMBLE_GAIN:
            continue
        plan = best.plan.with_(candidate) if best is not None else Plan.of([candidate])
        known = best is not None and candidate in best.plan.steps or ledger.failed(plan) is not None
        if known or (ledger.fuel is not None and len(plan) > ledger.fuel):
            continue
        if ledger.slow(plan) and ledger.setup(plan) < _GAMBLE * left:
            waiting.append((candidate, plan))
    if not waiting or not ledger.time_for(_GAMBLE_LEAST * ledger.budget.seconds):
        return best
    candidate, plan = max(waiting, key=lambda item: worth(item[0], left))
    if best is not None:
        return _in_place(ledger, candidate, plan, best)
    outcome = ledger.run(plan)
    if outcome.accepted:
        return outcome
    outcome.close()
    ledger.reject_by(candidate, outcome)
    return None


def _their_fault(outcome: Outcome, freed: Sequence[Candidate]) -> bool:
    """Whether a plan may be accepted without what was ``freed`` for it: it was somewhat slower, or wrong."""
    if outcome.accepted:
        return False
    if outcome.rule == "slower":
        return ratio(outcome) >= HOPELESS
    return outcome.judged_wrong or outcome.culprit in freed


def _together(steps: Sequence[Candidate]) -> float:
    """What ``steps`` are predicted to gain together."""
    return math.prod(step.gain for step in steps)


def _hope(candidate: Candidate, best: Outcome) -> float:
    """The predicted gain of ``candidate`` over what it would replace in ``best``."""
    before = 1.0
    for step in best.plan.steps:
        if excludes(step, candidate) is not None:
            before *= max(1.0, step.gain)
    return candidate.gain / before
