"""What a search goes on with where the commit refused the plan that it had found, because it is wrong.

The steps that gave the refused plan its level are gone; what is stricter is innocent. So is what was rejected
in company of those steps, or for being slower than they are. It goes on from the stricter plan that was kept
for the commit to fall back on, if there is one: that was overtaken before its own alternatives were tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from kpt.transaction.ledger import Ledger
from kpt.transaction.plan import Plan
from kpt.transaction.receipt import Entry

if TYPE_CHECKING:
    from kpt.transaction.outcome import Outcome
    from kpt.transaction.plan import Candidate

#: What the commit refuses by these says nothing of whether a plan is right.
_BY_THE_CLOCK = ("slower", "no-effect", "deadline")
#: Rules that say nothing of a candidate in other company.
_IN_COMPANY = ("slower", "no-effect", "budget", "fuel")


class Refusal(NamedTuple):
    """A plan that the commit refused, by which rule and why."""

    plan: Plan
    rule: str
    reason: str


def after(ledger: Ledger, refusals: Sequence[Refusal]) -> Ledger | None:
    """The ledger of a search for what else there is, after ``refusals`` of the last one's best plans.

    None where it was only the clock that refused, or must not choose, and where nothing is left, or no time.
    What there was no time for is rejected for that, so that a longer search may still try it, unless there is
    another plan to commit.
    """
    if ledger.fixed or all(each.rule in _BY_THE_CLOCK for each in refusals):
        return None
    gone = {step for each in refusals for step in each.plan.steps if step.level == each.plan.level}
    gone |= ledger.refused
    best = ledger.found.best
    refused = {step.name for each in refusals for step in each.plan.steps}
    names = {step.name for step in gone}
    kept = [
        entry
        for entry in ledger.found.rejected
        if entry.name in names or (entry.name not in refused and _stays(entry, ledger, gone, best))
    ]
    closed = {entry.name for entry in kept}
    left = [candidate for candidate in ledger.offered if candidate.name not in closed]
    if not left or (best is not None and {*left} <= {*best.plan.steps}):
        return None
    said = [f"the commit refused {each.plan.key} ({each.rule})" for each in refusals]
    others = [candidate for candidate in ledger.offered if candidate.name in closed]
    new = Ledger(ledger.trials, ledger.offered, ledger.budget, fuel=ledger.fuel, closed=others)
    if best is not None:
        new.begin_with(best)
        if not new.time_for(new.cost(Plan(), best)):
            return None
    elif not new.time_for(0.0):
        reason = f"not tried without {', '.join(sorted(names))}: {' and '.join(said)}, with no time left"
        kept += [Entry(each.name, each.phase, each.plugin, "budget", reason) for each in left]
        ledger.found.rejected[:] = kept
        return None
    new.refused, new.found.rejected = gone, kept
    new.found.notes += [f"{text}; the search went on without {', '.join(sorted(names))}" for text in said]
    known = {key: outcome for key, outcome in ledger.tried.items() if _holds(outcome, gone, best)}
    new.tried = {**known, **new.tried}
    new.evidence = {name: outcome for name, outcome in ledger.evidence.items() if name in closed}
    new.gated, new.pace = ledger.gated, ledger.pace
    return new


def _stays(entry: Entry, ledger: Ledger, gone: Iterable[Candidate], best: Outcome | None) -> bool:
    """Whether a rejection says the same without the steps that are ``gone``."""
    outcome = ledger.evidence.get(entry.name)
    return _holds(outcome, gone, best) if outcome is not None else entry.rule not in _IN_COMPANY


def _holds(outcome: Outcome, gone: Iterable[Candidate], best: Outcome | None) -> bool:
    """Whether a trial would fail again without what is ``gone``, if what it was timed against is, too.

    Against ``best`` it would."""
    rival = outcome.rival.steps if outcome.rival is not None else ()
    if outcome.accepted or any(step in outcome.plan.steps for step in gone):
        return False
    if outcome.right:  # it was slower than something, which may not be found again
        return not rival or outcome.over_eager <= 1.0 or (best is not None and rival == best.plan.steps)
    # What it was to be timed against was in memory, too.
    return outcome.rule != "memory" or not any(step in rival for step in gone)
