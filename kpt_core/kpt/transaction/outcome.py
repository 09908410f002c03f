"""How one trial ended, and what of it is kept alive."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kpt.specs import LEVELS

if TYPE_CHECKING:
    from kpt.judge.timing import Timing
    from kpt.transaction.applied import Applied
    from kpt.transaction.plan import Candidate, Plan

#: The commit judges and times again, on more inputs and for longer: as many times what a trial took for that.
_COMMIT = 1.5
_RULES_THAT_JUDGE = frozenset(
    (
        "value",
        "nan",
        "gradient",
        "shape",
        "size",
        "mask",
        "structure",
        "dtype",
        "replay",
        "unwritten",
        "global-state",
    )
)


@dataclass
class Outcome:
    """How one trial ended. ``applied`` is alive only for an accepted trial, until it is closed.

    So is ``quiet``, the same plan on the model without dropout, by which values are judged where the
    outputs depend on random numbers. ``over_eager`` is how many times faster than the untouched model it is,
    through what it was timed against: the plan of ``rival``, if not that model. ``thorough`` says that it was
    judged on as many calls as in a commit, and ``final`` that the commit then need not. ``beneath`` is the
    accepted outcome of a stricter level that it took the place of, alive as long as it is.
    """

    plan: Plan
    rule: str = "ok"
    reason: str = ""
    timing: Timing | None = None
    culprit: Candidate | None = None
    figures: dict[str, float] = field(default_factory=dict)
    #: Of all applications of the plan that the trial made: two where dropout decides the outputs.
    setup_seconds: float = 0.0
    applications: int = 1
    seconds: float = 0.0
    applied: Applied | None = None
    quiet: Applied | None = None
    over_eager: float = 0.0
    rival: Plan | None = None
    thorough: bool = False
    final: bool = False
    beneath: Outcome | None = None

    @property
    def right(self) -> bool:
        """The referee accepted, whatever the clock said."""
        return self.rule in ("ok", "slower")

    @property
    def accepted(self) -> bool:
        return self.rule == "ok"

    @property
    def judged_wrong(self) -> bool:
        return self.rule in _RULES_THAT_JUDGE

    @property
    def commit_seconds(self) -> float:
        """What its commit is expected to take, by what the trial took to judge and to time it."""
        return _COMMIT * (self.seconds - self.setup_seconds)

    def to_dict(self) -> dict[str, Any]:
        return {
            "plan": list(self.plan.names),
            "rule": self.rule,
            "reason": self.reason,
            "timing": self.timing.to_dict() if self.timing else None,
            "figures": self.figures,
            "setup_seconds": self.setup_seconds,
            "seconds": self.seconds,
        }

    def supersede(self, other: Outcome) -> None:
        """Take the place of ``other``, which is closed, or kept beneath where its level is the stricter.

        What a level allows may be right on the inputs of a trial and wrong on those of the commit.
        """
        known = [each for each in (self.beneath, other, other.beneath) if each is not None]
        self.beneath = other.beneath = None
        stricter = [each for each in known if each.plan.stricter_than(self.plan)]
        # The bolder of two is the faster one by what was tried; of one level the clock says which.
        kept = max(stricter, key=lambda each: (LEVELS.index(each.plan.level), each.over_eager), default=None)
        for each in known:
            if each is kept:
                self.beneath = each
            else:
                each.close()

    def close(self) -> None:
        self.hush()
        if self.applied is not None:
            self.applied.close()
            self.applied = None
        if self.beneath is not None:
            self.beneath.close()
            self.beneath = None

    def hush(self) -> None:
        """Free the application without dropout: nothing is judged any more."""
        if self.quiet is not None:
            self.quiet.close()
            self.quiet = None
