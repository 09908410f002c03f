"""Time several callables in one interleaved loop, so that a drift of the machine hits them all.

Every round hands each contender, in a new random order, the same fresh inputs: a short block of calls of
which the first is not counted. It absorbs what the contender before has left behind: worker threads that
still spin, caches full of somebody else's weights. Blocks are equally long for everybody, because inputs of
different sizes cost different times.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

#: A block is long enough for the clock: the fastest contender's takes about this many seconds.
BLOCK_SECONDS = 0.004


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the baseline: the median of paired ratios and its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}× ({self.low:.2f}–{self.high:.2f})"


def race(
    contenders: Mapping[str, Callable[[Any], object]],
    fresh: Callable[[int], Any],
    *,
    seconds: float = 10.0,
    least_rounds: int = 7,
) -> dict[str, list[float]]:
    """Seconds per call, one figure for each round and contender; the lists are paired by round.

    ``fresh(n)`` gives the inputs of the n-th call; equal ``n`` must give equal inputs.
    """
    quickest = float("inf")
    for run in contenders.values():
        run(fresh(0))
        started = time.perf_counter()
        run(fresh(1))
        quickest = min(quickest, time.perf_counter() - started)
    counted = max(1, min(50, round(BLOCK_SECONDS / max(quickest, 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    order, shuffle = list(contenders), random.Random(0)
    drawn = 2
    rounds, deadline = 0, time.perf_counter() + seconds
    while rounds < least_rounds or time.perf_counter() < deadline:
        inputs = [fresh(drawn + step) for step in range(1 + counted)]
        drawn += len(inputs)
        shuffle.shuffle(order)
        for name in order:
            run = contenders[name]
            run(inputs[0])
            started = time.perf_counter()
            for values in inputs[1:]:
                run(values)
            samples[name].append((time.perf_counter() - started) / counted)
        rounds += 1
    return samples


def ratio(baseline: list[float], candidate: list[float], *, resamples: int = 1000) -> Ratio:
    """How much faster ``candidate`` is than ``baseline``, whose samples were taken in the same rounds."""
    ratios = [before / after for before, after in zip(baseline, candidate)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(resamples))
    return Ratio(
        statistics.median(ratios), medians[int(0.025 * resamples)], medians[int(0.975 * resamples) - 1]
    )
