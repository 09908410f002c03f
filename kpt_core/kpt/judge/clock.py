"""The clock: paired timing of a baseline and a candidate, with an interval for their ratio.

Both run in one loop, in random order within each pair, on fresh inputs, so that drift, caches and
neighbours hit both. The device is synchronised around each timed span; garbage collection is off.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kpt.judge.calls import Call
from kpt.judge.load import ONE_BY_ONE, Issue, Load, one_by_one

#: Calls shorter than this are repeated inside one timed span: a clock reading costs about 0.1 µs, and a
#: span of 200 µs keeps that and the loop under 1 %.
SPAN_SECONDS = 200e-6
MAX_REPEATS = 64
#: A warm-up pair as slow as this counts as a measured pair: its cold start is negligible.
SLOW_SECONDS = 0.5
#: How far from 1.0 the interval has to lie to stop early: what is close gets all the time there is.
MARGIN = 0.03
_RESAMPLES = 1000


@dataclass(frozen=True)
class Timing:
    """A candidate against a baseline.

    ``ratio`` is the median of baseline / candidate over the pairs (above 1: the candidate is faster),
    ``low`` and ``high`` bound it with 95 % confidence, or 99 % after a second look. Seconds are medians per
    call. ``drift`` is the baseline's median in the last third of the pairs over that in the first, ``noise``
    the relative median absolute deviation of the ratios, ``repeats`` the calls in one timed span.
    """

    ratio: float
    low: float
    high: float
    baseline_seconds: float
    candidate_seconds: float
    pairs: int
    drift: float = 1.0
    noise: float = 0.0
    repeats: int = 1

    @property
    def faster(self) -> bool:
        """Whether the candidate is faster beyond doubt: the interval's lower bound exceeds 1."""
        return self.low > 1.0

    @property
    def iterations(self) -> int:
        """Timed calls of each side."""
        return self.pairs * self.repeats

    def to_dict(self) -> dict[str, float]:
        """The figures as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Measurement:
    """One function alone: median seconds per call, its 95 % interval, and how many spans were timed."""

    seconds: float
    low: float
    high: float
    spans: int
    repeats: int
    noise: float


def synchroniser(device: torch.device | str | None = None) -> Callable[[], None]:
    """A function that waits for ``device`` (default: the current accelerator, if any is in use)."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind = torch.device(device).type if device is not None else None
    if accelerator is None or kind == "cpu":
        return _nothing
    index = torch.device(device).index if device is not None else None
    # All streams of the device are waited for: work moved to a side stream is still counted.
    return lambda: torch.accelerator.synchronize(index)


def _nothing() -> None:
    return None


def cache_flusher(megabytes: int = 256, device: torch.device | str = "cpu") -> Callable[[], None]:
    """A function that evicts a device's caches by writing ``megabytes`` MB, for timing single kernels."""
    scratch = torch.empty(megabytes * 1_000_000, dtype=torch.int8, device=device)

    def flush() -> None:
        scratch.zero_()

    return flush


def paired(
    baseline: Callable[..., Any],
    candidate: Callable[..., Any],
    next_call: Callable[[], Call],
    *,
    seconds: float = 2.0,
    patience: float = 0.0,
    min_pairs: int = 7,
    max_pairs: int = 400,
    warmup: int = 1,
    synchronize: Callable[[], None] | None = None,
    flush: Callable[[], None] | None = None,
    deadline: float | None = None,
    timer: Callable[[], float] = time.perf_counter,
    seed: int = 0,
    load: Load = ONE_BY_ONE,
) -> Timing:
    """Time ``baseline`` and ``candidate`` alternately on the calls that ``next_call`` draws.

    Each side gets its own clone of every call, made outside of the timed span. Stops after
    ``seconds`` once ``min_pairs`` are in, at ``max_pairs``, at ``deadline`` (a reading of ``timer``)
    whatever is in, or early when a 99.8 % interval lies clear of 1.0 and is narrow. With fewer than three
    pairs nothing is claimed: the interval is (0, infinity).

    Args:
        patience: seconds more where one side looks faster after ``seconds`` and the interval still holds
            1.0; the interval is then one of 99 %, since it was looked at twice.
        synchronize: waits for the device; default: for the current accelerator, if there is one.
        flush: evicts caches before each timed span; each span is then a single call.
        load: how the calls of one span arrive. With more than one call at a time, seconds are those of the
            span over the number of its calls: the inverse of the throughput.

    Raises:
        ValueError: ``min_pairs`` or ``max_pairs`` make no sense, or caches are to be flushed between calls
            that arrive at once.
        Exception: whatever either side raises.
    """
    if min_pairs < 1 or max_pairs < min_pairs:
        raise ValueError(f"expected 1 <= min_pairs <= max_pairs, got {min_pairs} and {max_pairs}")
    if flush is not None and load.calls > 1:
        raise ValueError(f"caches can't be flushed before each call of {load}; expected one call at a time")
    wait = synchronize or synchroniser()
    order = random.Random(seed)
    sides = (baseline, candidate)
    times: tuple[list[float], list[float]] = ([], [])
    looked_longer = False
    with _collector_off(), load.issuing() as issue:
        repeats = 1
        start = timer()
        for round_number in range(max(warmup, 1)):
            first = _pair(sides, next_call, load.calls, order, wait, flush, timer, issue)
            if _passed(deadline, timer) or min(first) >= SLOW_SECONDS:
                # One more warm-up of a slow call would cost more than its cold start distorts.
                if round_number == 0:
                    _append(times, first)
                break
            if flush is None:
                repeats = _repeats(min(first), repeats)
        if repeats > 1:  # a first call may be slow for reasons of its own: calibrate on a warm one
            again = _pair(sides, next_call, load.calls, order, wait, flush, timer, issue)
            repeats = _repeats(min(again), 1)
        repeats = load.calls * math.ceil(repeats / load.calls)  # every caller has as many
        check, end = min_pairs, start + seconds
        while len(times[0]) < max_pairs and not (times[0] and _passed(deadline, timer)):
            pairs = len(times[0])
            if pairs >= min_pairs and timer() >= end:
                if looked_longer or patience <= 0.0 or not _undecided(times, seed):
                    break
                end, looked_longer = end + patience, True
            if pairs >= check:
                if _settled(times, pairs >= 2 * min_pairs, seed):
                    break
                # Looking rarely keeps repeated looks from finding a winner by chance.
                check = math.ceil(pairs * 1.5)
            _append(times, _pair(sides, next_call, repeats, order, wait, flush, timer, issue))
    return _timing(times, repeats, seed, 0.99 if looked_longer else 0.95)


def measure(
    function: Callable[..., Any],
    next_call: Callable[[], Call],
    *,
    seconds: float = 1.0,
    min_spans: int = 5,
    max_spans: int = 400,
    synchronize: Callable[[], None] | None = None,
    flush: Callable[[], None] | None = None,
    deadline: float | None = None,
    timer: Callable[[], float] = time.perf_counter,
    seed: int = 0,
) -> Measurement:
    """Time one function alone, by the same rules as `paired`."""
    wait = synchronize or synchroniser()
    spans: list[float] = []
    with _collector_off():
        start = timer()
        first = _span(function, [next_call()], wait, flush, timer)
        repeats = 1
        if first >= SLOW_SECONDS:
            spans.append(first)
        elif flush is None and _repeats(first, 1) > 1:
            repeats = _repeats(_span(function, [next_call()], wait, flush, timer), 1)
        while len(spans) < max_spans and not (spans and _passed(deadline, timer)):
            if len(spans) >= min_spans and timer() - start >= seconds:
                break
            calls = [next_call() for _ in range(repeats)]
            spans.append(_span(function, calls, wait, flush, timer))
    low, high = interval(spans, 0.95, seed)
    middle = statistics.median(spans)
    return Measurement(middle, low, high, len(spans), repeats, _spread(spans, middle))


@contextmanager
def _collector_off() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _passed(deadline: float | None, timer: Callable[[], float]) -> bool:
    return deadline is not None and timer() >= deadline


def _repeats(seconds: float, fallback: int) -> int:
    if seconds <= 0.0:
        return MAX_REPEATS
    return (
        max(fallback, min(MAX_REPEATS, math.ceil(SPAN_SECONDS / seconds)))
        if seconds < SPAN_SECONDS
        else fallback
    )


def _append(times: tuple[list[float], list[float]], pair: tuple[float, float]) -> None:
    for kept, value in zip(times, pair, strict=True):
        kept.append(value)


def _pair(
    sides: tuple[Callable[..., Any], Callable[..., Any]],
    next_call: Callable[[], Call],
    repeats: int,
    order: random.Random,
    wait: Callable[[], None],
    flush: Callable[[], None] | None,
    timer: Callable[[], float],
    issue: Issue,
) -> tuple[float, float]:
    """Seconds per call of both sides on the same fresh calls, in random order."""
    drawn = [next_call() for _ in range(repeats)]
    copies = [call.clone() if isinstance(call, Call) else call for call in drawn]
    first = order.randrange(2)
    one = _span(sides[first], drawn, wait, flush, timer, issue)
    other = _span(sides[1 - first], copies, wait, flush, timer, issue)
    return (one, other) if first == 0 else (other, one)


def _span(
    function: Callable[..., Any],
    calls: Sequence[Call],
    wait: Callable[[], None],
    flush: Callable[[], None] | None,
    timer: Callable[[], float],
    issue: Issue = one_by_one,
) -> float:
    """Seconds per call over ``calls``."""
    if flush is not None:
        flush()
    wait()
    start = timer()
    issue(function, calls)
    wait()
    return (timer() - start) / len(calls)


def interval(values: Sequence[float], confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval of the median; the range of 3 to 5 values; (0, infinity) for fewer."""
    number = len(values)
    if number < 3:
        return 0.0, math.inf
    if number < 6:  # resampling so few values understates the doubt
        return min(values), max(values)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(number, (_RESAMPLES, number), generator=generator)
    samples = torch.tensor(values, dtype=torch.float64)[picks].sort(dim=1).values
    medians = ((samples[:, (number - 1) // 2] + samples[:, number // 2]) / 2.0).sort().values
    tail = int((1.0 - confidence) / 2.0 * _RESAMPLES)
    return float(medians[tail]), float(medians[_RESAMPLES - 1 - tail])


def _ratios(times: tuple[list[float], list[float]]) -> list[float]:
    return [before / after if after > 0.0 else 1.0 for before, after in zip(*times, strict=True)]


def _settled(times: tuple[list[float], list[float]], many: bool, seed: int) -> bool:
    """Whether more pairs would change nothing: far from 1.0 at 99.8 %, and narrow or already many.

    Every look is a chance to stop at an accident; with these margins the looks together add
    little to the interval's own 2.5 % on either side (a test simulates it).
    """
    ratios = _ratios(times)
    low, high = interval(ratios, 0.998, seed)
    clear = low > 1.0 + MARGIN or high < 1.0 - MARGIN
    return clear and (many or high - low <= 0.1 * statistics.median(ratios))


def _undecided(times: tuple[list[float], list[float]], seed: int) -> bool:
    """Whether one side looks faster and the interval does not say so."""
    ratios = _ratios(times)
    low, high = interval(ratios, 0.95, seed)
    return low <= 1.0 <= high and abs(statistics.median(ratios) - 1.0) > MARGIN


def _spread(values: Sequence[float], middle: float) -> float:
    if not middle:
        return 0.0
    return statistics.median(abs(value - middle) for value in values) / middle


def _timing(
    times: tuple[list[float], list[float]], repeats: int, seed: int, confidence: float = 0.95
) -> Timing:
    ratios = _ratios(times)
    ratio = statistics.median(ratios)
    low, high = interval(ratios, confidence, seed)
    third = len(ratios) // 3
    drift = 1.0
    if third:
        drift = statistics.median(times[0][-third:]) / max(statistics.median(times[0][:third]), 1e-12)
    return Timing(
        ratio=ratio,
        low=low,
        high=high,
        baseline_seconds=statistics.median(times[0]),
        candidate_seconds=statistics.median(times[1]),
        pairs=len(ratios),
        drift=drift,
        noise=_spread(ratios, ratio),
        repeats=repeats,
    )
