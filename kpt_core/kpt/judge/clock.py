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
from dataclasses import dataclass
from typing import Any

import torch

from kpt.judge import spans
from kpt.judge.calls import Call
from kpt.judge.intervals import LEAST_OF_A_KIND, interval, least_of_a_kind, spread
from kpt.judge.kinds import Kind, one_kind
from kpt.judge.load import ONE_BY_ONE, Load
from kpt.judge.timing import TOLERANCE, Sample, Timing, summarised, together, total

#: Calls shorter than this are repeated inside one timed span: a clock reading costs about 0.1 µs, and a
#: span of 200 µs keeps that and the loop under 1 %.
SPAN_SECONDS = 200e-6
MAX_REPEATS = 64
#: A warm-up pair as slow as this counts as a measured pair: its cold start is negligible.
SLOW_SECONDS = 0.5
#: The same where calls of several kinds are timed: each kind has a warm-up pair, and each was called before.
SLOW_OF_KINDS = 0.05
#: How far from 1.0 the interval has to lie to stop early: what is close gets all the time there is.
MARGIN = 0.03


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
    calls: Callable[[], Call] | Sequence[Kind],
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
    settle: float = 0.0,
) -> Timing:
    """Time ``baseline`` and ``candidate`` alternately on fresh calls.

    Each side gets its own clone of every call, made outside of the timed span. Stops after
    ``seconds`` once ``min_pairs`` are in, at ``max_pairs``, at ``deadline`` (a reading of ``timer``)
    whatever is in, or early when a 99.8 % interval lies clear of 1.0 and is narrow. With fewer than three
    pairs (five, of several kinds), or a kind that was not reached, nothing is claimed: the interval is
    (0, infinity).

    Args:
        calls: draws one call; or the kinds of calls. Each kind gets three pairs at least (five, where it is
            most of the calls), and then the one whose next pair tells most for the time it takes: pairs go by
            share over the square root of the time (Neyman's allocation, for equal noise).
        patience: seconds more where one side looks faster after ``seconds`` and the interval still holds
            1.0; the interval is then one of 99 %, since it was looked at twice. Where it does not, and it is
            open whether all kinds together take longer, pairs go by what a kind is of the seconds.
        min_pairs: of all kinds together; three of each kind are wanted in any case.
        warmup: pairs that do not count, with calls of one kind. Of several kinds, each of which both sides
            have to have been called with before, it is one of each, and none where that takes long.
        synchronize: waits for the device; default: for the current accelerator, if there is one.
        flush: evicts caches before each timed span; each span is then a single call.
        load: how the calls of one span arrive. With more than one call at a time, seconds are those of the
            span over the number of its calls: the inverse of the throughput.
        settle: seconds of calls of a side's own before each of its spans, one call at least, that do not
            count: what the other side has left behind on the cores is over then, as in a process that calls
            one of them alone. Not where both sides take `spans.SETTLED` times as long, or several calls
            arrive at once.

    Raises:
        ValueError: ``min_pairs`` or ``max_pairs`` make no sense (for so many kinds), there is no kind of
            call, or caches are to be flushed between calls that arrive at once.
        Exception: whatever either side raises.
    """
    if min_pairs < 1 or max_pairs < min_pairs:
        raise ValueError(f"expected 1 <= min_pairs <= max_pairs, got {min_pairs} and {max_pairs}")
    if flush is not None and load.calls > 1:
        raise ValueError(f"caches can't be flushed before each call of {load}; expected one call at a time")
    samples = [Sample(kind) for kind in (one_kind(calls) if callable(calls) else calls)]
    if not samples:
        raise ValueError("expected one kind of call at least, got none")
    if len(samples) > 1:
        min_pairs, warmup = max(min_pairs, sum(least_of_a_kind(s.kind.share) for s in samples)), 1
        if max_pairs < min_pairs:
            raise ValueError(
                f"{len(samples)} kinds of calls want {min_pairs} pairs, got max_pairs={max_pairs}"
            )
    settle = settle if load.calls == 1 else 0.0
    slow = SLOW_SECONDS if len(samples) == 1 else SLOW_OF_KINDS
    wait = synchronize or synchroniser()
    order = random.Random(seed)
    sides = (baseline, candidate)
    looked_longer = by_total = False
    with _collector_off(), load.issuing() as issue:

        def pair(sample: Sample, repeats: int) -> tuple[float, float]:
            begun = timer()
            before = spans.settling_calls(sample.known, settle)
            found = spans.pair(
                sides, sample.kind.next_call, repeats, order, wait, flush, timer, issue, before
            )
            sample.cost = min(sample.cost, timer() - begun)
            sample.known = found
            return found

        start = timer()
        for sample in samples:
            if any(other.baseline for other in samples) and _passed(deadline, timer):
                break
            _warm_up(sample, warmup, pair, load.calls, slow, deadline, timer, calibrated=flush is None)
        check, end, taken = min_pairs, start + seconds, sum(len(sample.baseline) for sample in samples)
        while taken < max_pairs and not (taken and _passed(deadline, timer)):
            if taken >= min_pairs and timer() >= end:
                if looked_longer or patience <= 0.0 or not _undecided(samples, seed):
                    break
                by_total = together(samples, 0.95, seed)[1] > 1.0  # what is open is the total alone
                end, looked_longer = end + patience, True
            if taken >= check:
                if _settled(samples, taken >= 2 * min_pairs, seed):
                    break
                # Looking rarely keeps repeated looks from finding a winner by chance.
                check = math.ceil(taken * 1.5)
            sample = _next(samples, by_total)
            sample.append(pair(sample, sample.repeats))
            taken += 1
    return summarised(samples, seed, 0.99 if looked_longer and not by_total else 0.95)


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
    timed: list[float] = []
    with _collector_off():
        start = timer()
        first = spans.span(function, [next_call()], wait, flush, timer)
        repeats = 1
        if first >= SLOW_SECONDS:
            timed.append(first)
        elif flush is None and _repeats(first, 1) > 1:
            repeats = _repeats(spans.span(function, [next_call()], wait, flush, timer), 1)
        while len(timed) < max_spans and not (timed and _passed(deadline, timer)):
            if len(timed) >= min_spans and timer() - start >= seconds:
                break
            calls = [next_call() for _ in range(repeats)]
            timed.append(spans.span(function, calls, wait, flush, timer))
    low, high = interval(timed, 0.95, seed)
    center = statistics.median(timed)
    return Measurement(center, low, high, len(timed), repeats, spread(timed, center))


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


def _next(samples: Sequence[Sample], by_total: bool) -> Sample:
    """Whose turn it is: who has fewest pairs, until all have enough; then who tells most for its time."""
    waiting = [s for s in samples if len(s.baseline) < least_of_a_kind(s.kind.share)]
    if waiting:
        return min(waiting, key=lambda sample: len(sample.baseline))

    def pairs_by_worth(sample: Sample) -> float:
        worth = sample.kind.share * (statistics.median(sample.baseline) if by_total else 1.0)
        return len(sample.baseline) * math.sqrt(max(sample.cost, 1e-9)) / max(worth, 1e-12)

    return min(samples, key=pairs_by_worth)


def _warm_up(
    sample: Sample,
    rounds: int,
    pair: Callable[[Sample, int], tuple[float, float]],
    at_once: int,
    slow: float,
    deadline: float | None,
    timer: Callable[[], float],
    *,
    calibrated: bool,
) -> None:
    """Run pairs that do not count, except for a very slow first one, and choose the calls of a span."""
    for number in range(max(rounds, 1)):
        first = pair(sample, at_once)
        if _passed(deadline, timer) or min(first) >= slow:
            # One more warm-up of a slow call would cost more than its cold start distorts.
            if number == 0:
                sample.append(first)
            break
        if calibrated:
            sample.repeats = _repeats(min(first), sample.repeats)
    if sample.repeats > 1:  # a first call may be slow for reasons of its own: calibrate on a warm one
        sample.repeats = _repeats(min(pair(sample, at_once)), 1)
    sample.repeats = at_once * math.ceil(sample.repeats / at_once)  # every caller has as many
    if not sample.baseline:
        sample.cost = math.inf  # pairs of as many calls as the measured ones tell what those take


def _settled(samples: Sequence[Sample], many: bool, seed: int) -> bool:
    """Whether more pairs would change nothing: far from 1.0 at 99.8 %, and narrow or already many.

    Every look is a chance to stop at an accident; with these margins the looks together add
    little to the interval's own 2.5 % on either side (a test simulates it).
    """
    ratio, low, high = together(samples, 0.998, seed)
    clear = (low > 1.0 + MARGIN and not _total_open(samples, 0.998, seed)) or high < 1.0 - MARGIN
    return clear and (many or high - low <= 0.1 * ratio)


def _total_open(samples: Sequence[Sample], confidence: float, seed: int) -> bool:
    """Whether it is open if all kinds of calls together take longer."""
    if len(samples) == 1:
        return False
    _, low, high = total(samples, confidence, seed)
    return low < 1.0 - TOLERANCE < high


def _undecided(samples: Sequence[Sample], seed: int) -> bool:
    """Whether one side looks faster, on one kind of call at least, and the interval does not say so.

    Or it does, and all kinds together may take longer.
    """
    ratio, low, high = together(samples, 0.95, seed)
    if low > 1.0:
        return _total_open(samples, 0.95, seed)
    return high >= 1.0 and (abs(ratio - 1.0) > MARGIN or any(_apart(sample, seed) for sample in samples))


def _apart(sample: Sample, seed: int) -> bool:
    """Whether this kind of call alone is clearly slower or faster: it may be a small share of all."""
    ratios = sample.ratios
    low, high = interval(ratios, 0.95, seed)
    return len(ratios) >= LEAST_OF_A_KIND and (low > 1.0 + MARGIN or high < 1.0 - MARGIN)
