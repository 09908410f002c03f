"""Stage 4: find the best plan within the budget.

First the whole stack of best predictions, since steps help each other (int8 alone may lose where
int8 under a compiler wins). Then every step of the stack must pay for itself in company. Then
alternatives for what was chosen, while their predicted gain is worth their trial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kpt.transaction import gate
from kpt.transaction.events import emit
from kpt.transaction.plan import Candidate, Plan, assemble, excludes, worth
from kpt.transaction.receipt import Entry
from kpt.transaction.trial import Outcome, Trials

if TYPE_CHECKING:
    from kpt.transaction.budget import Budget
    from kpt.transaction.plan import Proposals

#: Alternatives predicted to gain less than this over what is there are not tried.
_WORTH = 1.02
#: Share of the budget kept at least for the commit's own judgement and timing.
_RESERVE = 0.1
#: The commit judges and times again, on more inputs and for longer: as many times what a trial took for that.
_COMMIT = 1.5
#: Steps of this level may be wrong, or slow to compile, where those of the other levels are not.
_BOLD = "aggressive"
#: Share of the budget up to which a set-up is no risk.
_QUICK = 0.02
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


class Search:
    """One search; `run` returns what it found.

    ``fuel`` bounds how many candidates a plan may hold, best predictions first, so that a bad step
    can be found by bisection. In torch's deterministic mode the plan is the stack of the variants that
    promise equal bits, in a fixed order; the clock can only refuse it as a whole.
    """

    def __init__(
        self, trials: Trials, proposals: Proposals, budget: Budget, *, fuel: int | None = None
    ) -> None:
        self.trials = trials
        self.budget = budget
        self.fuel = fuel
        self.open = list(proposals.candidates)
        self.deterministic = False
        self.found = Found()
        self._gone: set[Candidate] = set()
        self._wrong_plans: set[str] = set()
        self._reserve = _RESERVE * budget.seconds

    def run(self) -> Found:
        """Search; whatever ends the search early, no workspace stays behind."""
        try:
            return self._run()
        except BaseException:
            for outcome in self.trials.log:
                outcome.close()
            raise

    def _run(self) -> Found:
        self.deterministic = self.trials.observation.deterministic
        if self.deterministic:
            self._only_reproducible()
        self._gate()
        best = self._stack()
        if not self.deterministic:  # else clocks would choose the plan, and with it the bits
            if best is None:
                best = self._singles()
            if best is not None:
                best = self._ablate(best)
                best = self._alternatives(best)
        self._leftovers(best)
        self.found.best = best
        return self.found

    # -- stages

    def _only_reproducible(self) -> None:
        for candidate in self._candidates():
            if not candidate.variant.reproducible:
                reason = "torch's deterministic mode is on and the variant does not promise equal bits"
                self._reject(candidate, "nondeterministic", reason)

    def _gate(self) -> None:
        """Kernels are judged alone first: a wrong one is named by what is wrong with it."""
        for candidate in [c for c in self.open if c.phase == "kernels"]:
            if self._time_for(0.0):
                verdict = gate.judge(candidate, self.trials)
                if not verdict.passed:
                    self._reject(candidate, verdict.rule, verdict.detail, figures=verdict.figures)

    def _stack(self) -> Outcome | None:
        """The best stack: of all steps, or of the cautious ones where the bold ones do not hold.

        A stack that quantises and takes long to set up may use up the budget and then be wrong, or
        never end. The one without such steps is bought first, and the bold one has to beat it.
        """
        bold = self._assembled(self._candidates())
        cautious = [candidate for candidate in self._candidates() if candidate.level != _BOLD]
        if (
            self.deterministic
            or bold.level != _BOLD
            or sum(step.variant.setup_seconds for step in bold.steps) < _QUICK * self.budget.seconds
        ):
            return self._holding(self._candidates)
        best = self._holding(lambda: [c for c in cautious if c not in self._gone])
        if best is None:
            return self._holding(self._candidates)
        bold = self._assembled(self._candidates())
        if bold.level != _BOLD or bold.key in self._wrong_plans or not self._time_for(self._cost(bold, best)):
            return best
        outcome = self._try(bold, against=best)
        if outcome.accepted:
            best.close()
            return outcome
        outcome.close()
        for step in bold.steps:
            if step.level == _BOLD:
                self._reject_outcome(step, outcome)
        return best

    def _assembled(self, candidates: Iterable[Candidate]) -> Plan:
        return assemble(candidates, budget=self.budget.seconds, limit=self.fuel, fixed=self.deterministic)

    def _holding(self, candidates: Callable[[], list[Candidate]]) -> Outcome | None:
        """The first stack of ``candidates()`` that holds, dropping whatever is at fault until one does."""
        while True:
            plan = self._assembled(candidates())
            if not plan.steps or plan.key in self._wrong_plans:
                return None
            outcome = self._try(plan)
            if outcome.right and outcome.applied is not None:
                if outcome.accepted:
                    return outcome
                outcome.close()
                if len(plan) == 1:
                    self._reject_outcome(plan.steps[0], outcome)
                return None
            if outcome.rule in ("budget", "deadline") and self.budget.left() < 0.2 * self.budget.seconds:
                return None
            if not self._blame(plan, outcome):
                return None

    def _blame(self, plan: Plan, outcome: Outcome) -> bool:
        """Reject what made ``plan`` fail; False when nothing could be found at fault."""
        if outcome.culprit is not None:
            self._reject_outcome(outcome.culprit, outcome)
            return True
        if len(plan) == 1:
            self._reject_outcome(plan.steps[0], outcome)
            return True
        if outcome.rule == "deadline":
            if not any(step.variant.setup_seconds for step in plan.steps):
                self._wrong_plans.add(plan.key)
                return False  # nobody announced to be slow: they are tried one by one
            slowest = max(plan.steps, key=_own_setup)
            self._reject_outcome(slowest, outcome)
            # What announces as long a set-up would take the rest of the budget the same way.
            for other in self._candidates():
                if _own_setup(other) >= _own_setup(slowest):
                    reason = f"not tried: {slowest.name}, with no longer a set-up, was stopped"
                    self._reject(other, "deadline", reason)
            return True
        # Quick ones first, and no further than the first that is at fault: to see whether a compiler is
        # innocent costs as much as the next whole stack, which tells the same.
        for step in sorted(plan.steps, key=lambda step: step.variant.setup_seconds):
            if not self._time_for(step.variant.setup_seconds):
                break
            alone = self._try(Plan.of([step]), timed=False)
            alone.close()
            if not alone.right:
                self._reject_outcome(step, alone)
                return True
        # Each is right alone, so it is their company that fails: leave the least promising one out.
        self._wrong_plans.add(plan.key)
        weakest = min(plan.steps, key=lambda step: step.gain)
        self._reject(weakest, outcome.rule, f"in company of {plan.without(weakest).key}: {outcome.reason}")
        return True

    def _singles(self) -> Outcome | None:
        """No stack was faster: the most promising candidates one by one, and the best of them."""
        best: Outcome | None = None
        if self.fuel == 0:
            return None
        for candidate in sorted(self._candidates(), key=lambda c: -worth(c, self.budget.seconds)):
            if candidate.gain <= 1.0:
                self._reject(candidate, "slower", f"predicted {candidate.gain:.2f}x, not tried")
                continue
            if not self._time_for(candidate.variant.setup_seconds):
                continue
            outcome = self._try(Plan.of([candidate]))
            if not outcome.accepted:
                outcome.close()
                self._reject_outcome(candidate, outcome)
                continue
            if best is not None:
                better, worse = (outcome, best) if _ratio(outcome) > _ratio(best) else (best, outcome)
                worse.close()
                loser = worse.plan.steps[0]
                self._reject(
                    loser,
                    "slower",
                    f"{_ratio(worse):.2f}x alone; {better.plan.key} gives {_ratio(better):.2f}x",
                )
                best = better
            else:
                best = outcome
        return best

    def _ablate(self, best: Outcome) -> Outcome:
        """Drop every step without which the plan is not slower."""
        if len(best.plan) == 1:
            self.found.gains[best.plan.steps[0].name] = _ratio(best)
            return best
        for step in sorted(best.plan.steps, key=lambda step: step.gain):
            if len(best.plan) == 1:
                break
            cost = self._cost(best.plan.without(step), best)
            if not self._time_for(cost):
                self.found.notes.append(f"{step.name} was not timed apart: no budget left for it")
                continue
            reduced = self._try(best.plan.without(step), against=best)
            if not reduced.right or reduced.timing is None:
                reduced.close()
                continue
            # The clock paired the full plan (baseline) with the reduced one (candidate).
            share = 1.0 / reduced.timing.ratio
            if reduced.timing.high < 1.0:
                self.found.gains[step.name] = share
                reduced.close()
                continue
            self._reject(
                step,
                "slower",
                f"{share:.2f}x in company of {reduced.plan.key}: does not pay for itself",
                share,
            )
            best.close()
            reduced.rule, reduced.reason = "ok", ""
            best = reduced
        if len(best.plan) == 1 and best.plan.steps[0].name not in self.found.gains:
            self.found.gains[best.plan.steps[0].name] = _ratio(best)
        return best

    def _alternatives(self, best: Outcome) -> Outcome:
        """Try what was left out in place of (or beside) what was chosen, most promising first."""
        for candidate in sorted(self._candidates(), key=lambda c: -worth(c, self.budget.seconds)):
            if any(candidate is step for step in best.plan.steps):
                continue
            replaced = [step for step in best.plan.steps if excludes(step, candidate) is not None]
            before = 1.0
            for step in replaced:
                before *= max(1.0, step.gain)
            hope = candidate.gain / before
            plan = best.plan.with_(candidate)
            if self.fuel is not None and len(plan) > self.fuel:
                continue
            # Predictions are rough: an alternative is hopeless only if it is predicted clearly worse.
            if candidate.gain <= 1.0 or hope < (0.75 if replaced else _WORTH):
                self._reject(candidate, "slower", f"predicted {hope:.2f}x of what was chosen, not tried")
                continue
            if plan.key in self._wrong_plans or not self._time_for(self._cost(plan, best)):
                continue
            outcome = self._try(plan, against=best)
            if outcome.accepted:
                for step in replaced:
                    self._reject(
                        step, "slower", f"{candidate.name} in its place gives {_ratio(outcome):.2f}x"
                    )
                    self.found.gains.pop(step.name, None)
                self.found.gains[candidate.name] = _ratio(outcome)
                best.close()
                best = outcome
            else:
                outcome.close()
                self._reject_outcome(candidate, outcome)
        return best

    def _leftovers(self, best: Outcome | None) -> None:
        chosen = set(best.plan.steps) if best is not None else set()
        full = self.fuel is not None and len(chosen) >= self.fuel
        rule, reason = "budget", "not tried: no budget left, or excluded by what was chosen"
        if full:
            rule, reason = "fuel", f"not tried: fuel={self.fuel} allows no further variant"
        for candidate in self._candidates():
            if candidate not in chosen:
                self._reject(candidate, rule, reason)

    # -- helpers

    def _candidates(self) -> list[Candidate]:
        return [candidate for candidate in self.open if candidate not in self._gone]

    def _cost(self, plan: Plan, best: Outcome) -> float:
        """Expected seconds of a trial: predicted set-up, scaled by how the last prediction held."""
        predicted = sum(step.variant.setup_seconds for step in plan.steps)
        known = sum(step.variant.setup_seconds for step in best.plan.steps)
        factor = best.setup_seconds / known if known > 0.5 and best.setup_seconds > 0.0 else 1.0
        return predicted * min(factor, 3.0) + max(1.0, best.seconds - best.setup_seconds)

    def _time_for(self, seconds: float) -> bool:
        return self.budget.left() - self._reserve > seconds

    def _keep_for_commit(self, outcome: Outcome) -> None:
        """What is found is lost if the commit has no time: a slow model needs more than a share."""
        if outcome.right and outcome.timing is not None:
            self._reserve = max(self._reserve, _COMMIT * (outcome.seconds - outcome.setup_seconds))

    def _try(self, plan: Plan, *, against: Outcome | None = None, timed: bool = True) -> Outcome:
        emit("trial", f"trying {plan.key}", seconds=self.budget.spent(), budget=self.budget.seconds)
        outcome = self.trials.run(
            plan,
            against=against.applied if against is not None else None,
            keep=True,
            timed=timed,
            seconds=self._patience(plan),
        )
        self._keep_for_commit(outcome)
        text = f"{plan.key}: {outcome.rule}" + (f" ({_ratio(outcome):.2f}x)" if outcome.timing else "")
        emit("trial", text, rule=outcome.rule, seconds=self.budget.spent(), budget=self.budget.seconds)
        return outcome

    def _patience(self, plan: Plan) -> float:
        """Seconds that a trial may take: all there is only if nothing else is open or its set-up asks for it.

        A variant that never comes back must not take the budget of all others.
        """
        left = max(0.5, self.budget.left() - self._reserve)
        if len(self._candidates()) < 2:
            return left
        announced = _OVERRUN * sum(step.variant.setup_seconds for step in plan.steps)
        return min(left, max(_PATIENCE * left, announced))

    def _reject_outcome(self, candidate: Candidate, outcome: Outcome) -> None:
        gain = _ratio(outcome) if outcome.timing else None
        self._reject(candidate, outcome.rule, outcome.reason, gain, outcome.figures)

    def _reject(
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


def _own_setup(candidate: Candidate) -> tuple[bool, float]:
    """By whose set-up a stack was slow: longest last.

    Other shapes have none of their own: what they announce is that a compiler beside them is set up twice.
    """
    seconds = candidate.variant.setup_seconds
    return seconds > 0.0 and candidate.phase != "shapes", seconds


def _ratio(outcome: Outcome) -> float:
    return outcome.timing.ratio if outcome.timing is not None else 0.0
