"""Stage 4: find the best plan within the budget.

First the stack of best predictions, since steps help each other (int8 alone may lose where int8 under a
compiler wins). Then every step of the stack must pay for itself in company. Then alternatives for what was
chosen, while their predicted gain is worth their trial.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpt.transaction import gate, stacks
from kpt.transaction.ledger import Found, Ledger, ratio
from kpt.transaction.plan import Plan, excludes, worth
from kpt.transaction.trial import Outcome, Trials

if TYPE_CHECKING:
    from kpt.transaction.budget import Budget
    from kpt.transaction.plan import Proposals

#: Alternatives predicted to gain less than this over what is there are not tried.
_WORTH = 1.02


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
        self.ledger = Ledger(trials, proposals.candidates, budget, fuel=fuel)

    def run(self) -> Found:
        """Search; whatever ends the search early, no workspace stays behind."""
        try:
            return self._run()
        except BaseException:
            for outcome in self.trials.log:
                outcome.close()
            raise

    def _run(self) -> Found:
        ledger = self.ledger
        ledger.fixed = self.trials.observation.deterministic
        if ledger.fixed:
            self._only_reproducible()
        self._gate()
        best = stacks.first(ledger)
        if not ledger.fixed:  # else clocks would choose the plan, and with it the bits
            if best is None:
                best = self._singles()
            if best is not None:
                best = self._ablate(best)
                best = self._alternatives(best)
        self._leftovers(best)
        ledger.found.best = best
        return ledger.found

    # -- stages

    def _only_reproducible(self) -> None:
        for candidate in self.ledger.open():
            if not candidate.variant.reproducible:
                reason = "torch's deterministic mode is on and the variant does not promise equal bits"
                self.ledger.reject(candidate, "nondeterministic", reason)

    def _gate(self) -> None:
        """Kernels are judged alone first: a wrong one is named by what is wrong with it."""
        for candidate in [c for c in self.ledger.open() if c.phase == "kernels"]:
            if self.ledger.time_for(0.0):
                verdict = gate.judge(candidate, self.trials)
                if not verdict.passed:
                    self.ledger.reject(candidate, verdict.rule, verdict.detail, figures=verdict.figures)

    def _singles(self) -> Outcome | None:
        """No stack was faster: the most promising candidates one by one, and the best of them."""
        best: Outcome | None = None
        ledger = self.ledger
        if ledger.fuel == 0:
            return None
        waiting = sorted(ledger.open(), key=lambda c: -worth(c, ledger.budget.seconds))
        for number, candidate in enumerate(waiting):
            if candidate.gain <= 1.0:
                ledger.reject(candidate, "slower", f"predicted {candidate.gain:.2f}x, not tried")
                continue
            known = ledger.failed(Plan.of([candidate]))
            if known is None and not ledger.time_for(candidate.variant.setup_seconds):
                continue
            outcome = known or ledger.run(Plan.of([candidate]), among=len(waiting) - number)
            if not outcome.accepted:
                outcome.close()
                ledger.reject_by(candidate, outcome)
                continue
            if best is not None:
                better, worse = (outcome, best) if ratio(outcome) > ratio(best) else (best, outcome)
                worse.close()
                loser = worse.plan.steps[0]
                ledger.reject(
                    loser,
                    "slower",
                    f"{ratio(worse):.2f}x alone; {better.plan.key} gives {ratio(better):.2f}x",
                )
                best = better
            else:
                best = outcome
        return best

    def _ablate(self, best: Outcome) -> Outcome:
        """Drop every step without which the plan is not slower."""
        ledger = self.ledger
        gains = ledger.found.gains
        for step in sorted(best.plan.steps, key=lambda step: step.gain):
            if len(best.plan) == 1:
                break
            cost = ledger.cost(best.plan.without(step), best)
            if not ledger.time_for(cost):
                ledger.found.notes.append(f"{step.name} was not timed apart: no budget left for it")
                continue
            reduced = ledger.run(best.plan.without(step), against=best)
            if not reduced.right or reduced.timing is None:
                reduced.close()
                continue
            # The clock paired the full plan (baseline) with the reduced one (candidate).
            share = 1.0 / reduced.timing.ratio
            if reduced.timing.high < 1.0:
                gains[step.name] = share
                reduced.close()
                continue
            ledger.reject(
                step,
                "slower",
                f"{share:.2f}x in company of {reduced.plan.key}: does not pay for itself",
                share,
            )
            best.close()
            reduced.rule, reduced.reason = "ok", ""
            best = reduced
        if len(best.plan) == 1:
            gains[best.plan.steps[0].name] = best.over_eager
        return best

    def _alternatives(self, best: Outcome) -> Outcome:
        """Try what was left out in place of (or beside) what was chosen, most promising first."""
        ledger = self.ledger
        for candidate in sorted(ledger.open(), key=lambda c: -worth(c, ledger.budget.seconds)):
            if any(candidate is step for step in best.plan.steps):
                continue
            replaced = [step for step in best.plan.steps if excludes(step, candidate) is not None]
            before = 1.0
            for step in replaced:
                before *= max(1.0, step.gain)
            hope = candidate.gain / before
            plan = best.plan.with_(candidate)
            if ledger.fuel is not None and len(plan) > ledger.fuel:
                continue
            # Predictions are rough: an alternative is hopeless only if it is predicted clearly worse.
            if candidate.gain <= 1.0 or hope < (0.75 if replaced else _WORTH):
                ledger.reject(candidate, "slower", f"predicted {hope:.2f}x of what was chosen, not tried")
                continue
            known = ledger.failed(plan)
            if known is not None:
                ledger.reject_by(candidate, known)
                continue
            if not ledger.time_for(ledger.cost(plan, best)):
                continue
            outcome = ledger.run(plan, against=best)
            if outcome.accepted:
                for step in replaced:
                    ledger.reject(
                        step, "slower", f"{candidate.name} in its place gives {ratio(outcome):.2f}x"
                    )
                    ledger.found.gains.pop(step.name, None)
                ledger.found.gains[candidate.name] = ratio(outcome)
                best.close()
                best = outcome
            else:
                outcome.close()
                ledger.reject_by(candidate, outcome)
        return best

    def _leftovers(self, best: Outcome | None) -> None:
        ledger = self.ledger
        chosen = set(best.plan.steps) if best is not None else set()
        full = ledger.fuel is not None and len(chosen) >= ledger.fuel
        rule, reason = "budget", "not tried: no budget left, or excluded by what was chosen"
        if full:
            rule, reason = "fuel", f"not tried: fuel={ledger.fuel} allows no further variant"
        for candidate in ledger.open():
            if candidate not in chosen:
                ledger.reject(candidate, rule, reason)
