"""Stage 4: find the best plan within the budget.

First the stack of best predictions, since steps help each other (int8 alone may lose where int8 under a
compiler wins). Then every step of the stack must pay for itself in company, and alternatives are tried while
their predicted gain is worth their trial: what costs no set-up first, then what promises most; to leave out
what is predicted to gain much comes last. What is left of the budget at the end is given to what was thought
to take longer.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kpt.transaction import alternatives, fixed_order, gate, stacks
from kpt.transaction.ledger import ratio
from kpt.transaction.plan import Plan, excludes, worth
from kpt.transaction.watch import why_no_copies

if TYPE_CHECKING:
    from kpt.judge.timing import Timing
    from kpt.transaction.ledger import Found, Ledger
    from kpt.transaction.outcome import Outcome
    from kpt.transaction.plan import Candidate

#: A step without which the plan seems this much slower stays, even if noise leaves that open.
_STAYS = 1.1


class Search:
    """One search; `run` returns what it found.

    The ledger's ``fuel`` bounds how many candidates a plan may hold, best predictions first, so that a
    bad step can be found by bisection. In torch's deterministic mode the plan is the stack of the variants
    that promise equal bits, in a fixed order; the clock can only refuse it as a whole.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.trials = ledger.trials
        self.ledger = ledger
        #: Plans, and the same without a step, between which the clock saw no difference.
        self._level: set[tuple[str, str]] = set()
        #: The same, where there was too little time for the clock to claim anything.
        self._untold: set[tuple[str, str]] = set()
        #: Steps, and those without which they were seen to have no effect.
        self._needs: set[tuple[Candidate, Candidate]] = set()

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
        self._without_copies()
        self._gate()
        best = fixed_order.only(ledger) if ledger.fixed else stacks.first(ledger)
        if not ledger.fixed:  # else clocks would choose the plan, and with it the bits
            if best is None:
                best = self._singles()
            if best is not None:
                best = self._ablate(best, least=math.inf)
                best = alternatives.tried(ledger, best, least=alternatives.PROMISING)
                best = self._ablate(best, least=alternatives.HOPELESS)
                best = alternatives.tried(ledger, best)
                best = self._ablate(best)
            best = alternatives.gamble(ledger, best)
        self._leftovers(best)
        ledger.found.best = best
        return ledger.found

    # -- stages

    def _only_reproducible(self) -> None:
        for candidate in self.ledger.open():
            if not candidate.variant.reproducible:
                reason = "torch's deterministic mode is on and the variant does not promise equal bits"
                self.ledger.reject(candidate, "nondeterministic", reason)

    def _without_copies(self) -> None:
        """No plan may hold copies of weights whose writes are not counted: none is tried, or preferred."""
        copying = [candidate for candidate in self.ledger.open() if candidate.variant.derives]
        reason = why_no_copies(self.trials.observation.model) if copying else None
        for candidate in copying if reason is not None else ():
            self.ledger.reject(candidate, "no-effect", f"not tried: {reason}")

    def _gate(self) -> None:
        """Kernels are judged alone first: a wrong one is named by what is wrong with it."""
        for candidate in [c for c in self.ledger.open() if c.kernel and c not in self.ledger.gated]:
            if self.ledger.time_for(0.0):
                verdict = gate.judge(candidate, self.trials)
                if verdict.passed:
                    self.ledger.gated.add(candidate)
                else:
                    if self.ledger.fixed and verdict.rule == "deadline":
                        fixed_order.refuse(self.ledger, "deadline", f"{candidate.name}: {verdict.detail}")
                        return
                    self.ledger.reject(candidate, verdict.rule, verdict.detail, figures=verdict.figures)

    def _singles(self) -> Outcome | None:
        """No stack was faster: the candidates one by one, and the best of them.

        What needs no set-up comes first, then the most promising.
        """
        best: Outcome | None = None
        ledger = self.ledger
        if ledger.fuel == 0:
            return None
        waiting = sorted(
            ledger.open(),
            key=lambda c: (ledger.slow(Plan.of([c])), -worth(c, ledger.budget.seconds)),
        )
        for number, candidate in enumerate(waiting):
            if candidate.gain <= 1.0:
                ledger.reject(candidate, "slower", f"predicted {candidate.gain:.2f}x, not tried")
                continue
            plan = Plan.of([candidate])
            known = ledger.failed(plan)
            if ledger.slow(plan):
                ledger.spare = 0.0
            if known is None and not ledger.time_for(ledger.setup(plan)):
                continue
            outcome = known or ledger.run(plan, among=len(waiting) - number)
            if not outcome.accepted:
                outcome.close()
                if ledger.slow(plan) or not outcome.right:  # else it may yet be faster beside a compiler
                    ledger.reject_by(candidate, outcome)
                continue
            ledger.spare = 0.0
            if best is None:
                best = outcome
                continue
            better, worse = (outcome, best) if ratio(outcome) > ratio(best) else (best, outcome)
            ledger.supersede(worse, better)
            loser = worse.plan.steps[0]
            if excludes(loser, better.plan.steps[0]) is not None:  # else it is tried beside the best
                ledger.reject(loser, "slower", _alone(worse, better))
            best = better
        return best

    def _ablate(self, best: Outcome, *, least: float = 0.0) -> Outcome:
        """Drop every step without which the plan is not slower, or not by enough to tell it in this noise.

        Where that needs a set-up, a step without which the plan promises less than ``least`` stays. So does,
        as long as a compiler may come, one that costs it nothing and makes no difference without it: not
        where ``least`` is 0, after which none comes.
        """
        ledger = self.ledger
        for step in sorted(best.plan.steps, key=lambda step: step.gain):
            if len(best.plan) == 1:
                break
            without = best.plan.without(step)
            known = ledger.failed(without)
            if step in ledger.paid or (known is not None and not known.right):
                continue
            if any((other, step) in self._needs for other in best.plan.steps):
                continue
            if 1.0 / step.gain < least and ledger.slow(without):
                continue
            pair = best.plan.key, without.key
            if pair in self._untold:
                continue
            if least > 0.0 and pair in self._level and self._may_pay_later(step, best):
                continue
            if not ledger.time_for_plan(without, best):
                note = f"{step.name} was not timed apart: no budget left for it"
                if note not in ledger.found.notes:
                    ledger.found.notes.append(note)
                continue
            reduced = ledger.run(without, against=best)
            if not reduced.right or reduced.timing is None:
                if reduced.rule == "no-effect" and reduced.culprit is not None:
                    self._needs.add((reduced.culprit, step))
                reduced.close()
                continue
            if not reduced.timing.told:
                note = f"{step.name} was timed too little to tell what it gains"
                if note not in ledger.found.notes:
                    ledger.found.notes.append(note)
                self._untold.add(pair)
                reduced.close()
                continue
            # The clock paired the full plan (baseline) with the reduced one (candidate).
            share = 1.0 / reduced.timing.ratio
            if reduced.timing.high < 1.0 or reduced.timing.longer or share >= _STAYS:
                ledger.found.gain(step.name, share, _doubt(reduced.timing))
                ledger.paid.add(step)
                reduced.close()
                continue
            if least > 0.0 and reduced.timing.low <= 1.0 and self._may_pay_later(step, best):
                self._level.add(pair)
                reduced.close()
                continue
            ledger.reject(
                step,
                "slower",
                f"{share:.2f}x in company of {reduced.plan.key}: does not pay for itself",
                share,
            )
            reduced.rule, reduced.reason = "ok", ""
            best = ledger.supersede(best, reduced)
        if len(best.plan) == 1:
            ledger.found.gain(best.plan.steps[0].name, best.over_eager)
        return best

    def _may_pay_later(self, step: Candidate, best: Outcome) -> bool:
        """Whether a set-up that ``step`` adds nothing to is still to be tried beside it."""
        ledger = self.ledger
        if step.phase == "shapes" or step.variant.setup_seconds > 0.0 or ledger.slow(best.plan):
            return False
        plans = [best.plan.with_(each) for each in ledger.open() if each not in best.plan.steps]
        slow = [plan for plan in plans if step in plan.steps and ledger.slow(plan)]
        return any(ledger.time_for_plan(plan, best) for plan in slow)

    def _leftovers(self, best: Outcome | None) -> None:
        ledger = self.ledger
        chosen = set(best.plan.steps) if best is not None else set()
        full = ledger.fuel is not None and len(chosen) >= ledger.fuel
        for candidate in ledger.open():
            if candidate in chosen:
                continue
            alone = ledger.tried.get(Plan.of([candidate]).key)
            if alone is not None and not alone.accepted:
                ledger.reject_by(candidate, alone)
            elif alone is not None and best is not None and _apart(candidate, best):
                ledger.reject(candidate, "slower", _alone(alone, best))
            elif full:
                found = "not tried" if alone is None else f"{alone.over_eager:.2f}x alone"
                ledger.reject(candidate, "fuel", f"{found}: fuel={ledger.fuel} allows no further variant")
            else:
                ledger.reject(candidate, "budget", self._untried(candidate, best))

    def _untried(self, candidate: Candidate, best: Outcome | None) -> str:
        """Why there was no trial of ``candidate``, when the search has ended."""
        ledger = self.ledger
        plan = best.plan.with_(candidate) if best is not None else Plan.of([candidate])
        seconds, left = ledger.cost(plan, best), ledger.budget.left()
        excluded = _apart(candidate, best) if best is not None else []
        against = next((f" in place of {step.name} ({why})" for step, why in excluded), "")
        alone = ledger.tried.get(Plan.of([candidate]).key)
        found = f"; {alone.over_eager:.2f}x alone" if alone is not None else ""
        if ledger.time_for(seconds):
            return f"not tried{against or ' beside what was chosen'}{found}"
        return (
            f"not tried{against}: its trial was expected to take {seconds:.0f} s; {left:.0f} s were left, "
            f"the commit's own among them{found}"
        )


def _apart(candidate: Candidate, best: Outcome) -> list[tuple[Candidate, str]]:
    """The steps of ``best`` that ``candidate`` can't come beside, and why."""
    reasons = ((step, excludes(step, candidate)) for step in best.plan.steps)
    return [(step, why) for step, why in reasons if why is not None]


def _alone(worse: Outcome, better: Outcome) -> str:
    return f"{worse.over_eager:.2f}x alone; {better.plan.key} gives {better.over_eager:.2f}x"


def _doubt(timing: Timing) -> str:
    """Between what the gain of a step lies, by the ``timing`` of the plan against that without it.

    Nothing where it is beyond doubt.
    """
    if timing.high < 1.0:
        return ""
    if timing.longer and timing.total is not None:
        return f"all kinds of calls together take {1.0 / timing.total:.2f} times as long without it"
    most = f"{1.0 / timing.low:.2f}x" if timing.low > 0.0 else "any number"
    return f"in doubt: its gain lies between {1.0 / timing.high:.2f}x and {most}"
