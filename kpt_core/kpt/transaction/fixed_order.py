"""The only plan of a search in torch's deterministic mode: the clock refuses it whole, or not at all.

Which steps a plan has decides the bits of its outputs. So nothing that depends on how fast the machine is may
leave one of them out: neither a trial that runs out of time nor a step that is slow. What is wrong is wrong
on every machine, and is left out by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpt.specs import PHASES
from kpt.transaction.plan import Plan

if TYPE_CHECKING:
    from kpt.transaction.ledger import Ledger
    from kpt.transaction.outcome import Outcome

_OF_THE_CLOCK = ("budget", "deadline", "slower")


def only(ledger: Ledger) -> Outcome | None:
    """The stack of all that is right, or None, with every step rejected for what the clock said of it."""
    while (plan := ledger.assembled(ledger.open())).steps:
        outcome = ledger.run(plan, among=1)  # there is no other plan to leave time for
        if outcome.accepted and outcome.applied is not None:
            return outcome
        outcome.close()
        if outcome.rule in _OF_THE_CLOCK or not _left_out(ledger, plan, outcome):
            refuse(ledger, outcome.rule, f"{plan.key}: {outcome.reason}")
            return None
    return None


def _left_out(ledger: Ledger, plan: Plan, outcome: Outcome) -> bool:
    """Reject the step of ``plan`` that made it fail; False where there was no time to find it."""
    if outcome.culprit in plan.steps:
        ledger.reject_by(outcome.culprit, outcome)
        return True
    if len(plan) == 1:
        ledger.reject_by(plan.steps[0], outcome)
        return True
    for step in plan.steps:
        alone = ledger.run(Plan.of([step]), timed=False, among=1)
        alone.close()
        if alone.rule in _OF_THE_CLOCK:
            return False
        if not alone.right:
            ledger.reject_by(step, alone)
            return True
    # Each is right alone, so it is their company that fails: leave out the one that was put in last. What it
    # is predicted to gain rests on measured rates, which differ from process to process.
    last = max(plan.steps, key=lambda step: (PHASES.index(step.phase), -step.priority, step.name))
    ledger.reject(last, outcome.rule, f"in company of {plan.without(last).key}: {outcome.reason}")
    return True


def refuse(ledger: Ledger, rule: str, what: str) -> None:
    """Reject every step for what the clock said of the plan, or of one of them: fewer would be other bits."""
    for step in ledger.open():
        ledger.reject(step, rule, f"torch's deterministic mode takes or refuses a plan as a whole; {what}")
