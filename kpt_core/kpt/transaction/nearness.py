"""What is as near to its limit as random inputs differ: it is judged on other calls."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from kpt.judge.tolerances import CLEAR, keep_worst
from kpt.judge.verdict import Verdict, rejected

if TYPE_CHECKING:
    from kpt.transaction.applied import Applied
    from kpt.transaction.budget import Budget
    from kpt.transaction.fresh_calls import Draw, FreshCalls

#: Times the allowed error up to which a rejection for precision may be by chance.
NEAR = 1.5
#: Other calls that such a plan is judged on;
_OTHERS = 2
#: one of whose logits the scores may have to decide, on as many as it takes to have seen this many positions,
#: since in few of them most often none is far off; but on no more than so many in all, and for no longer than
#: this share of the budget.
_POSITIONS, _MOST_OTHERS, _SHARE = 1000, 24, 0.1


class Others:
    """The calls that one judgement makes beside its draws. ``one`` judges a plan on a draw."""

    def __init__(
        self,
        calls: FreshCalls,
        budget: Budget,
        overruled: Callable[[str], bool],
        one: Callable[[Applied, Draw], tuple[Verdict, Any]],
    ) -> None:
        self._calls = calls
        self._budget = budget
        self._overruled = overruled
        self._one = one
        self.restart()

    def restart(self) -> None:
        """Another judgement begins."""
        self._made, self._positions, self._seconds = 0, 0, 0.0

    def wanted(self, applied: Applied, verdict: Verdict) -> bool:
        """Whether a plan in lower precision missed or met its tolerance by as little as random inputs differ.

        How much a rounding costs depends on where a model is called: some calls in a hundred amplify the same
        errors to twice what others do. Where somebody else decides of tolerances it is all the same.
        """
        plan = applied.plan
        if plan.compute_dtype is None or plan.level == "exact" or self._overruled("value"):
            return False
        return CLEAR < verdict.excess <= NEAR or (verdict.passed and "scored_positions" in verdict.figures)

    def judged(
        self, applied: Applied, draw: Draw, near: tuple[Verdict, Any], figures: dict[str, float]
    ) -> tuple[Draw, Verdict, Any]:
        """Judge other calls like ``draw``, on which the verdict was as ``near`` to what is allowed, or left
        it to scores; all have to keep clear of what is, whatever eager does. What is as near on each would be
        beyond it on some of the user's.

        ``figures`` are the worst so far; those of the others join them. Where eager refuses others like it,
        what was found on ``draw`` stands.

        What is wrong by itself, by a hundredth or at a size, is wrong there as well.
        """
        last, (verdict, output) = draw, near
        positions = int(verdict.figures.get("scored_positions", 0))  # none where scores decide nothing
        self._positions += positions
        number = 0
        while number < _OTHERS or (positions and self._more()):
            began = time.perf_counter()
            other = self._calls.like(draw)  # for which eager and the reference are called
            if other is None:
                return draw, *near
            last = other
            verdict, output = self._one(applied, last)
            number, self._made, self._positions = number + 1, self._made + 1, self._positions + positions
            self._seconds += time.perf_counter() - began
            keep_worst(figures, verdict.figures)
            if verdict.passed and verdict.excess > CLEAR:
                share = f"{verdict.excess:.0%} of what is allowed on one of several calls"
                detail = f"the error is {share}, of which all but one have to keep to {CLEAR:.0%}"
                verdict = rejected(last.rule, detail, verdict.figures)
            if not verdict.passed:
                break
        return last, verdict, output

    def _more(self) -> bool:
        """Whether scores are means over too few positions still, and there is time for more."""
        few = self._positions < _POSITIONS and self._made < _MOST_OTHERS
        return few and self._seconds < _SHARE * self._budget.seconds


def worst(missed: Iterable[Verdict | None]) -> Verdict | None:
    """The rejection that is farthest off, if there is one."""
    known = [each for each in missed if each is not None]
    return max(known, key=lambda each: each.excess, default=None)


def as_before(verdict: Verdict, missed: Verdict | None) -> bool:
    """Whether a call that ``missed`` what is allowed misses it in another form as well.

    By the same, that is, or, where the size of a miss can be told, by no more.
    """
    if missed is None:
        return False
    return missed.detail.endswith(f": {verdict.detail}") or verdict.excess <= NEAR * missed.excess < math.inf
