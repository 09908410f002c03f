"""What one search has tried, what became of each candidate, and what is left of the budget."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kpt.transaction.events import emit
from kpt.transaction.plan import Candidate, Plan, assemble
from kpt.transaction.receipt import Entry
from kpt.transaction.trial import Outcome, Trials

if TYPE_CHECKING:
    from kpt.transaction.budget import Budget

#: Share of the budget kept at least for the commit's own judgement and timing.
_RESERVE = 0.1
#: The commit judges and times again, on more inputs and for longer: as many times what a trial took for that.
_COMMIT = 1.5
#: A trial may take this many times the set-up that its variants announced,
_OVERRUN = 3.0
#: and at least this share of what is left: more would leave nothing for the others, less would stop a
#: compiler that is merely slow here, and what it promises is usually most of the gain.
_PATIENCE = 0.7


@dataclass
class Found:
    """The best plan's outcome (alive), or None, and what became of every candidate."""

    best: Outcome | None = None
    gains: dict[str, float] = field(default_factory=dict)
    rejected: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Ledger:
    """``tried`` holds the last outcome of each plan, by its key: a plan that failed is not tried again."""

    def __init__(
        self, trials: Trials, candidates: Iterable[Candidate], budget: Budget, *, fuel: int | None = None
    ) -> None:
        self.trials = trials
        self.budget = budget
        self.fuel = fuel
        self.offered = tuple(candidates)
        self.fixed = False
        self.found = Found()
        self.tried: dict[str, Outcome] = {}
        self._gone: set[Candidate] = set()
        self._reserve = _RESERVE * budget.seconds

    # -- candidates

    def open(self) -> list[Candidate]:
        """The candidates that nothing speaks against yet."""
        return [candidate for candidate in self.offered if candidate not in self._gone]

    def assembled(self, candidates: Iterable[Candidate]) -> Plan:
        """The stack of best predictions among ``candidates``."""
        return assemble(candidates, budget=self.budget.seconds, limit=self.fuel, fixed=self.fixed)

    def reject(
        self,
        candidate: Candidate,
        rule: str,
        reason: str,
        gain: float | None = None,
        figures: dict[str, float] | None = None,
    ) -> None:
        self._gone.add(candidate)
        self.found.rejected.append(
            Entry(candidate.name, candidate.phase, candidate.plugin, rule, reason, gain, dict(figures or {}))
        )

    def reject_by(self, candidate: Candidate, outcome: Outcome) -> None:
        """Reject ``candidate`` for what the trial ``outcome`` found."""
        gain = ratio(outcome) if outcome.timing else None
        self.reject(candidate, outcome.rule, outcome.reason, gain, outcome.figures)

    # -- trials and their time

    def run(
        self, plan: Plan, *, against: Outcome | None = None, timed: bool = True, among: int | None = None
    ) -> Outcome:
        """Try ``plan``, timed against another outcome's plan, or against the untouched model.

        Where it is one ``among`` several that wait for the same time, it gets its share of what is left.
        """
        emit("trial", f"trying {plan.key}", seconds=self.budget.spent(), budget=self.budget.seconds)
        outcome = self.trials.run(
            plan,
            against=against.applied if against is not None else None,
            keep=True,
            timed=timed,
            seconds=self._patience(plan, among),
        )
        outcome.over_eager = ratio(outcome) * (against.over_eager if against is not None else 1.0)
        if timed:
            self.tried[plan.key] = outcome
        self.keep_for_commit(outcome)
        text = f"{plan.key}: {outcome.rule}" + (f" ({ratio(outcome):.2f}x)" if outcome.timing else "")
        emit("trial", text, rule=outcome.rule, seconds=self.budget.spent(), budget=self.budget.seconds)
        return outcome

    def failed(self, plan: Plan) -> Outcome | None:
        """The outcome of ``plan`` where it was tried and not accepted."""
        outcome = self.tried.get(plan.key)
        return outcome if outcome is not None and not outcome.accepted else None

    def cost(self, plan: Plan, best: Outcome) -> float:
        """Expected seconds of a trial: predicted set-up, scaled by how the last prediction held."""
        predicted = sum(step.variant.setup_seconds for step in plan.steps)
        known = sum(step.variant.setup_seconds for step in best.plan.steps)
        factor = best.setup_seconds / known if known > 0.5 and best.setup_seconds > 0.0 else 1.0
        return predicted * min(factor, 3.0) + max(1.0, best.seconds - best.setup_seconds)

    def time_for(self, seconds: float) -> bool:
        return self.budget.left() - self._reserve > seconds

    def keep_for_commit(self, outcome: Outcome) -> None:
        """What is found is lost if the commit has no time: a slow model needs more than a share."""
        if outcome.right and outcome.timing is not None:
            self._reserve = max(self._reserve, _COMMIT * (outcome.seconds - outcome.setup_seconds))

    def _patience(self, plan: Plan, among: int | None) -> float:
        """Seconds that a trial may take: all there is only if nothing else is open or its set-up asks for it.

        A variant that never comes back must not take the budget of all others.
        """
        left = max(0.5, self.budget.left() - self._reserve)
        if len(self.open()) < 2:
            return left
        announced = _OVERRUN * sum(step.variant.setup_seconds for step in plan.steps)
        share = _PATIENCE if among is None else 1.0 / among
        return min(left, max(share * left, announced))


def ratio(outcome: Outcome) -> float:
    """How many times faster the clock found it than what it was timed against; 0.0 if it was not timed."""
    return outcome.timing.ratio if outcome.timing is not None else 0.0
