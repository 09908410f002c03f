"""What paired timing found: the times of each kind of call, and the figures that are made of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kpt.judge.intervals import average, interval, middle, spread, stratified_interval, total_interval
from kpt.judge.kinds import Kind

#: So much longer all kinds of calls together may seem to take: noise of the few pairs of slow calls.
TOLERANCE = 0.03


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
    ``low`` and ``high`` bound it with ``confidence``: 0.95, or 0.99 after a second look. Seconds are medians
    per call. Of calls of several kinds the ratio is the geometric mean of the kinds' medians and seconds are
    the arithmetic one, each weighed with the shares, and ``kinds`` has the kinds one by one. ``drift`` is the
    baseline's median in the last third of the pairs over that in the first, ``noise`` the relative median
    absolute deviation of the ratios, both of the kind where they are largest; ``repeats`` the fewest calls
    in one timed span. ``total`` is how many times faster all kinds together are in seconds, which is below
    ``total_high`` with 90 % confidence; None of one kind.
    """

    drift: float = 1.0
    noise: float = 0.0
    repeats: int = 1
    kinds: tuple[KindTiming, ...] = ()
    confidence: float = 0.95
    total: float | None = None
    total_high: float = math.inf

    @property
    def faster(self) -> bool:
        """Whether the candidate is faster beyond doubt: the interval's lower bound exceeds 1.

        Of several kinds of calls, all of them together must not take `longer` either.
        """
        return self.low > 1.0 and not self.longer

    @property
    def longer(self) -> bool:
        """Whether all kinds of calls together seem to take longer, by more than `TOLERANCE`.

        With 90 % confidence that they do: slow calls have few pairs, and noise must not refuse every gain.
        """
        return self.total is not None and self.total < 1.0 - TOLERANCE and self.total_high < 1.0

    @property
    def doubt(self) -> str:
        """Why it is not `faster`, for people."""
        if self.longer:
            return f"{self.ratio:.2f}x, but all calls together take longer: {self.total:.2f}x in seconds"
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
    """The times of one kind's pairs, how many calls each span holds, and the least that a pair took.

    ``known`` are the seconds of a call on either side in the last pair, 0.0 before there is one.
    """

    kind: Kind
    baseline: list[float] = field(default_factory=list)
    candidate: list[float] = field(default_factory=list)
    repeats: int = 1
    cost: float = math.inf
    known: tuple[float, float] = (0.0, 0.0)

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


def total(samples: Sequence[Sample], confidence: float, seed: int) -> tuple[float, float, float]:
    """How many times faster all kinds of calls together are in seconds, and the interval of that."""
    timed = [sample for sample in samples if sample.baseline]
    weights = [sample.kind.share * statistics.median(sample.baseline) for sample in timed]
    ratios = [sample.ratios for sample in timed]
    after = sum(w / max(statistics.median(own), 1e-12) for w, own in zip(weights, ratios, strict=True))
    return (sum(weights) / after if after else 1.0), *total_interval(ratios, weights, confidence, seed)


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
    seconds = total(samples, 0.8, seed) if len(samples) > 1 else (None, 0.0, math.inf)
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
        confidence=confidence,
        total=seconds[0],
        total_high=seconds[2],
    )


def _drift(seconds: Sequence[float]) -> float:
    third = len(seconds) // 3
    if not third:
        return 1.0
    return statistics.median(seconds[-third:]) / max(statistics.median(seconds[:third]), 1e-12)
