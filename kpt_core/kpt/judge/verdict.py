"""What a judgement says: accepted, or rejected by one of the rules, with what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

#: Every rule under which the referee rejects. Receipts and tests name them; they do not change.
RULES = (
    "value",
    "nan",
    "gradient",
    "stride",
    "shape",
    "size",
    "input-modified",
    "replay",
    "unwritten",
    "structure",
    "dtype",
    "nondeterministic",
    "accuracy",
    "dropout",
    "mask",
    "parameter-modified",
    "global-state",
    "error",
)


@dataclass(frozen=True)
class Verdict:
    """A judgement. ``rule`` is "ok" or the `RULES` entry that rejected; ``figures`` are what was measured.

    ``excess`` is how many times the error that a level allows was found, where that can be said: above 1 of a
    rejection, at most 1 of an acceptance. Of an acceptance that counts what is allowed whatever eager does in
    that dtype; the rest is 0.
    """

    passed: bool
    rule: str = "ok"
    detail: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    excess: float = math.inf

    def __bool__(self) -> bool:
        return self.passed

    def named(self, rule: str, detail: str = "") -> Verdict:
        """The same verdict, a rejection renamed to what revealed it (``size``, ``stride``)."""
        if self.passed:
            return self
        return replace(self, rule=rule, detail=f"{detail}: {self.detail}" if detail else self.detail)


def rejected(
    rule: str, detail: str, figures: Mapping[str, float] | None = None, *, excess: float = math.inf
) -> Verdict:
    """A rejection under one of `RULES`."""
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; the rules are {', '.join(RULES)}")
    return Verdict(False, rule, detail, dict(figures or {}), excess)


def passed(detail: str = "", figures: Mapping[str, float] | None = None, *, excess: float = 0.0) -> Verdict:
    """An acceptance."""
    return Verdict(True, "ok", detail, dict(figures or {}), excess)
