"""What one search has tried, what became of each candidate, and what is left of the budget."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kpt.transaction import memory
from kpt.transaction.events import emit
from kpt.transaction.freememory import free_memory
from kpt.transaction.outcome import Outcome
from kpt.transaction.plan import Candidate, Plan, assemble
from kpt.transaction.receipt import Entry

if TYPE_CHECKING:
    from kpt.transaction.budget import Budget
    from kpt.transaction.trial import Trials

#: Share of the budget kept at least for the commit's own judgement and timing.
_RESERVE = 0.1
#: Share of the free memory that a plan may hold for the commit to fall back on.
_BENEATH = 0.25
#: A trial may take this many times the set-up that its variants announced,
_OVERRUN = 3.0
#: and at least this share of what is left: more would leave nothing for the others, less would stop a
#: compiler that is merely slow here, and what it promises is usually most of the gain.
_PATIENCE = 0.7
#: Share of what is left that it takes at most where something was accepted before.
_MOST = 0.9
#: Where no set-up was announced a trial that takes long most likely hangs.
_PATIENCE_WITHOUT_SETUP = 0.25
#: Share of the budget up to which a set-up counts as none.
QUICK = 0.04
#: Calls of the model that a trial makes, about, to judge and to time a plan; the clock decides when to stop.
_CALLS = 40
#: Bounds of how many times the announced seconds set-ups take: some are answered from a compiler's cache,
#: which says nothing of the next; and one bad guess must not forbid all that follow.
_PACE = (0.5, 3.0)
#: Seconds of announced set-up below which what is imported and prepared once may be most of what it took.
_TELLING = 3.0


@dataclass
class Found:
    """The best plan's outcome (alive), or None, and what became of every candidate.

    While a search runs ``best`` is what it began with.
    """

    best: Outcome | None = None
    gains: dict[str, float] = field(default_factory=dict)
    rejected: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    #: What is said of gains that noise leaves open, by the step's name.
    doubts: dict[str, str] = field(default_factory=dict)

    def gain(self, name: str, value: float, doubt: str = "") -> None:
        """Note what the step ``name`` gains, and what is to be said of that, in place of what was noted."""
        self.gains[name] = value
        self.doubts.pop(name, None)
        if doubt:
            self.doubts[name] = doubt

    def forget_gain(self, name: str) -> float | None:
        """Drop what was noted of the step ``name``; the gain, if there was one."""
        self.doubts.pop(name, None)
        return self.gains.pop(name, None)


class Ledger:
    """``tried`` holds the last outcome of each plan, by its key: a plan that failed is not tried again."""

    def __init__(
        self,
        trials: Trials,
        candidates: Iterable[Candidate],
        budget: Budget,
        *,
        fuel: int | None = None,
        closed: Iterable[Candidate] = (),
    ) -> None:
        self.trials = trials
        self.budget = budget
        self.fuel = fuel
        self.offered = tuple(candidates)
        self.fixed = False
        self.found = Found()
        self.tried: dict[str, Outcome] = {}
        #: The trials for which candidates were rejected, where there was one, by the candidate's name.
        self.evidence: dict[str, Outcome] = {}
        #: Steps that gave plans their levels which the commit refused, in searches before this one.
        self.refused: set[Candidate] = set()
        #: Kernels that were judged alone and are right.
        self.gated: set[Candidate] = set()
        #: Steps that were seen to pay for themselves in company.
        self.paid: set[Candidate] = set()
        #: Seconds of set-up per announced second, as trials showed it here.
        self.pace = 1.0
        #: Seconds that slow set-ups leave to what needs none, while nothing was accepted.
        self.spare = 0.0
        #: What took the place of the best plan last: it may hold the one before beneath it.
        self._overtaking: Outcome | None = None
        #: Those that something speaks against: the ``closed`` ones already when the search begins.
        self._gone = {*closed}
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
        evidence: Outcome | None = None,
    ) -> None:
        self._gone.add(candidate)
        if evidence is not None:
            self.evidence[candidate.name] = evidence
        self.found.rejected.append(
            Entry(candidate.name, candidate.phase, candidate.plugin, rule, reason, gain, dict(figures or {}))
        )

    def reject_by(self, candidate: Candidate, outcome: Outcome) -> None:
        """Reject ``candidate`` for what the trial ``outcome`` found."""
        gain = ratio(outcome) if outcome.timing else None
        self.reject(candidate, outcome.rule, outcome.reason, gain, outcome.figures, outcome)

    # -- trials and their time

    def run(
        self, plan: Plan, *, against: Outcome | None = None, timed: bool = True, among: int | None = None
    ) -> Outcome:
        """Try ``plan``, timed against another outcome's plan, or against the untouched model.

        Where it is one ``among`` several that wait for the same time, it gets its share of what is left.
        Where memory runs out, what is kept for the commit to fall back on is freed, and it is tried again.
        """
        outcome = self._tried(plan, against, timed, among)
        if outcome.rule == "memory" and self._freed_for(plan):
            outcome.close()
            outcome = self._tried(plan, against, timed, among)
        outcome.over_eager = ratio(outcome) * (against.over_eager if against is not None else 1.0)
        outcome.rival = against.plan if against is not None else None
        if timed:
            self.tried[plan.key] = outcome
        self.keep_for_commit(outcome)
        self._learn_pace(outcome)
        text = f"{plan.key}: {outcome.rule}" + (f" ({ratio(outcome):.2f}x)" if outcome.timing else "")
        emit("trial", text, rule=outcome.rule, seconds=self.budget.spent(), budget=self.budget.seconds)
        return outcome

    def _tried(self, plan: Plan, against: Outcome | None, timed: bool, among: int | None) -> Outcome:
        emit("trial", f"trying {plan.key}", seconds=self.budget.spent(), budget=self.budget.seconds)
        return self.trials.run(
            plan,
            against=against.applied if against is not None else None,
            keep=True,
            timed=timed,
            seconds=self._patience(plan, among, against),
        )

    def _freed_for(self, plan: Plan) -> bool:
        """Whether a plan was kept beneath the best one; it is closed, and a note says for which trial."""
        holder = self._overtaking
        if holder is None or holder.beneath is None:
            return False
        beneath, holder.beneath = holder.beneath, None
        self.found.notes.append(
            f"{beneath.plan.key} was not kept for the commit to fall back on: memory ran out when {plan.key} "
            "was tried, which was tried again without it"
        )
        beneath.close()
        gc.collect()
        return True

    def failed(self, plan: Plan) -> Outcome | None:
        """The outcome of ``plan`` where it was tried and not accepted."""
        outcome = self.tried.get(plan.key)
        return outcome if outcome is not None and not outcome.accepted else None

    def setup(self, plan: Plan) -> float:
        """Expected seconds to set ``plan`` up: what its steps announced, at the pace of the trials so far."""
        return self.pace * self.announced(plan)

    def announced(self, plan: Plan) -> float:
        """The seconds of set-up that a trial of ``plan`` was announced to take, of all its applications.

        Where dropout decides the outputs, the values are judged on a second one.
        """
        return announced(plan) * (2 if self.trials.observation.stochastic else 1)

    def ready(self, outcome: Outcome) -> float:
        """About the seconds until a later process, which finds the plan of ``outcome`` cached, is ready.

        By what its set-up was announced to take, at the pace of those here: two plans may have found a
        compiler's cache as different.
        """
        return self.trials.began + self.setup(outcome.plan) + outcome.commit_seconds

    def slow(self, plan: Plan) -> bool:
        """Whether the set-up of ``plan`` is worth a thought."""
        return self.announced(plan) >= QUICK * self.budget.seconds

    def cost(self, plan: Plan, best: Outcome | None = None) -> float:
        """Expected seconds of a trial: its set-up, and what judging and timing took for ``best``."""
        known = best.seconds - best.setup_seconds if best is not None else 0.0
        return self.setup(plan) + max(1.0, known)

    def seconds_of_calls(self) -> float:
        """About what a trial without any set-up takes."""
        return 1.0 + _CALLS * self.trials.observation.baseline_seconds

    def time_for(self, seconds: float) -> bool:
        return self.budget.left() - self._reserve > seconds

    def time_for_plan(self, plan: Plan, best: Outcome | None = None) -> bool:
        """Whether ``plan`` is expected to fit into what is left, with what slow ones have to leave."""
        kept = self.spare if self.slow(plan) else 0.0
        return self.time_for(self.cost(plan, best) + kept)

    def supersede(self, best: Outcome | None, outcome: Outcome) -> Outcome:
        """``outcome`` in place of ``best``; where the commit may have to fall back, time is kept for that.

        A stricter ``best`` whose copies of weights would crowd the memory is closed, and a note says so.
        """
        if best is not None and best.plan.stricter_than(outcome.plan) and (held := self._crowds(best)):
            self.found.notes.append(
                f"{best.plan.key} was not kept for the commit to fall back on: it holds "
                f"{held / 2**20:.0f} MiB, more than {_BENEATH:.0%} of the memory that is free"
            )
            best.close()
        elif best is not None:
            outcome.supersede(best)
        self._overtaking = outcome
        self.keep_for_commit(outcome)
        return outcome

    def begin_with(self, best: Outcome) -> None:
        """Search for what is faster than ``best``, an accepted plan of a search before this one."""
        self.found.best = self._overtaking = best
        self.tried[best.plan.key] = best
        self.keep_for_commit(best)

    def _crowds(self, best: Outcome) -> int:
        """Bytes that ``best`` holds beyond the user's model, if they are too many to be kept; else 0."""
        observation = self.trials.observation
        alive = [each for each in (best.applied, best.quiet) if each is not None]
        held = sum(memory.derived_bytes(observation.model, each) for each in alive)
        return held if held > _BENEATH * free_memory(observation.device_type) else 0

    def _learn_pace(self, outcome: Outcome) -> None:
        """Other set-ups will take as many times what they announced as this one did."""
        seconds = self.announced(outcome.plan)
        if seconds < _TELLING:
            return
        if outcome.rule == "deadline":  # it would have taken longer still
            self.pace = max(self.pace, min(outcome.seconds / seconds, _PACE[1]))
        elif outcome.setup_seconds > 0.0:
            each = outcome.setup_seconds / outcome.applications
            self.pace = min(max(each / announced(outcome.plan), _PACE[0]), _PACE[1])

    def keep_for_commit(self, outcome: Outcome) -> None:
        """What is found is lost if its commit has no time, and then that of what lies beneath it.

        A slow model needs more than a share.
        """
        if outcome.right and outcome.timing is not None:
            beneath = outcome.beneath.commit_seconds if outcome.beneath is not None else 0.0
            self._reserve = max(self._reserve, outcome.commit_seconds + beneath)

    def _patience(self, plan: Plan, among: int | None, against: Outcome | None) -> float:
        """Seconds that a trial may take: all there is only if nothing else is open or its set-up asks for it.

        A variant that never comes back must not take the budget of all others.
        """
        left = max(0.5, self.budget.left() - self._reserve)
        if len(self.open()) < 2:
            return left
        needed = _OVERRUN * (self.announced(plan) + self.seconds_of_calls())
        share = 1.0 / among if among is not None else _PATIENCE_WITHOUT_SETUP
        if self.slow(plan):
            left = max(0.5, left - self.spare)
            if among is None:
                share, needed = _PATIENCE, left - (self._second_chance(plan) if against is None else 0.0)
            if against is not None:  # what was found has to be looked at more closely
                left *= _MOST
        return min(left, max(share * left, needed))

    def _second_chance(self, plan: Plan) -> float:
        """Seconds for the quickest slow set-up beside that of ``plan``, should that not come back.

        It may take as many times what it announced. One that is about as long would not come back either.
        """
        most = _PATIENCE * self.announced(plan)
        others = [Plan.of([other]) for other in self.open() if other not in plan.steps]
        quicker = [other for other in others if self.slow(other) and self.announced(other) < most]
        return min((1.0 + _OVERRUN * self.announced(other) for other in quicker), default=0.0)


def announced(plan: Plan) -> float:
    """The seconds of set-up that the steps of ``plan`` announced.

    Other shapes have none of their own: for each of them a compiler beside them is set up again.
    """
    longer = math.prod(step.variant.compile_ratio for step in plan.steps)
    compilers = longer * sum(step.variant.setup_seconds for step in plan.steps if step.phase == "compile")
    again = sum(min(step.variant.setup_seconds, compilers) for step in plan.steps if step.phase == "shapes")
    others = sum(s.variant.setup_seconds for s in plan.steps if s.phase not in ("compile", "shapes"))
    return compilers + again + others


def ratio(outcome: Outcome) -> float:
    """How many times faster the clock found it than what it was timed against; 0.0 if it was not timed."""
    return outcome.timing.ratio if outcome.timing is not None else 0.0
