"""What paired timing found: the times of each kind of call, and the figures that are made of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kpt.judge.intervals import average, interval, middle, spread, stratified_interval
from kpt.judge.kinds import Kind


@dataclass(frozen=True)
class _Figures:
    """A candidate against a baseline.

    ``ratio`` is the median of baseline / candidate over the pairs (above 1: the candidate is faster),
    ``low`` and ``high`` bound it with 95 % confidence, or 99 % after a second look. Seconds are medians per
    call.
    """

    ratio: float
    low: float
    high: float
    baseline_seconds: float
    candidate_seconds: float
    pairs: int


@dataclass(frozen=True)
class KindTiming(_Figures):
    """The figures of the calls of one kind, whose share of the examples is ``share``."""

    label: str
    share: float


@dataclass(frozen=True)
class Timing(_Figures):
    """A candidate against a baseline.

    ``ratio`` is the median of baseline / candidate over the pairs (above 1: the candidate is faster),
    ``low`` and ``high`` bound it with 95 % confidence, or 99 % after a second look. Seconds are medians per
    call. Of calls of several kinds the ratio is the geometric mean of the kinds' medians and seconds are the
    arithmetic one, each weighed with the shares, and ``kinds`` has the kinds one by one. ``drift`` is the
    baseline's median in the last third of the pairs over that in the first, ``noise`` the relative median
    absolute deviation of the ratios, both of the kind where they are largest; ``repeats`` the fewest calls
    in one timed span.
    """

    drift: float = 1.0
    noise: float = 0.0
    repeats: int = 1
    kinds: tuple[KindTiming, ...] = ()

    @property
    def faster(self) -> bool:
        """Whether the candidate is faster beyond doubt: the interval's lower bound exceeds 1.

        Of several kinds of calls, all of them together must not be `longer` either.
        """
        return self.low > 1.0 and not self.longer

    @property
    def longer(self) -> bool:
        """Whether all kinds of calls together take longer beyond doubt: even with each at its upper bound."""
        before = sum(kind.share * kind.baseline_seconds for kind in self.kinds)
        return sum(kind.share * kind.baseline_seconds / kind.high for kind in self.kinds) > before

    @property
    def doubt(self) -> str:
        """Why it is not `faster`, for people."""
        if self.longer:
            before, after = self.baseline_seconds * 1e3, self.candidate_seconds * 1e3
            return f"{self.ratio:.2f}x, but all calls together take longer ({before:.3g} -> {after:.3g} ms)"
        if not self.told:
            return f"{self.ratio:.2f}x, but timed too little to tell"
        return f"{self.ratio:.2f}x, not faster beyond doubt (from {self.low:.2f}x)"

    @property
    def told(self) -> bool:
        """Whether it claims anything: enough pairs were timed, of every kind of call."""
        return self.high < math.inf

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return asdict(self)


@dataclass
class Sample:
    """The times of one kind's pairs, how many calls each span holds, and the least that a pair took."""

    kind: Kind
    baseline: list[float] = field(default_factory=list)
    candidate: list[float] = field(default_factory=list)
    repeats: int = 1
    cost: float = math.inf

    def append(self, pair: tuple[float, float]) -> None:
        self.baseline.append(pair[0])
        self.candidate.append(pair[1])

    @property
    def ratios(self) -> list[float]:
        pairs = zip(self.baseline, self.candidate, strict=True)
        return [before / after if after > 0.0 else 1.0 for before, after in pairs]


def together(samples: Sequence[Sample], confidence: float, seed: int) -> tuple[float, float, float]:
    """The ratio over all kinds, and its interval."""
    ratios, shares = [sample.ratios for sample in samples], [sample.kind.share for sample in samples]
    return middle(ratios, shares), *stratified_interval(ratios, shares, confidence, seed)


def summarised(samples: Sequence[Sample], seed: int, confidence: float = 0.95) -> Timing:
    ratio, low, high = together(samples, confidence, seed)
    shares = [sample.kind.share for sample in samples]
    kinds = tuple(
        KindTiming(
            statistics.median(sample.ratios),
            *interval(sample.ratios, confidence, seed),
            statistics.median(sample.baseline),
            statistics.median(sample.candidate),
            len(sample.baseline),
            sample.kind.label,
            sample.kind.share,
        )
        for sample in samples
        if sample.baseline
    )
    return Timing(
        ratio=ratio,
        low=low,
        high=high,
        baseline_seconds=average([sample.baseline for sample in samples], shares),
        candidate_seconds=average([sample.candidate for sample in samples], shares),
        pairs=sum(len(sample.baseline) for sample in samples),
        drift=max((_drift(sample.baseline) for sample in samples), key=lambda drift: abs(drift - 1.0)),
        noise=max(spread(s.ratios, statistics.median(s.ratios)) for s in samples if s.baseline),
        repeats=min(sample.repeats for sample in samples),
        kinds=kinds if len(samples) > 1 else (),
    )


def _drift(seconds: Sequence[float]) -> float:
    third = len(seconds) // 3
    if not third:
        return 1.0
    return statistics.median(seconds[-third:]) / max(statistics.median(seconds[:third]), 1e-12)
