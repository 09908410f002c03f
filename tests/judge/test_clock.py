"""The clock, with time that the test itself lets pass."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kpt.judge.calls import Call
from kpt.judge.clock import cache_flusher, measure, paired
from kpt.judge.intervals import interval
from kpt.judge.spans import settling, settling_calls
from kpt.judge.timing import Timing


class Clock:
    """A timer that only functions made by `work` advance."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: Callable[[], float] | float) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            self.calls.append(name)
            self.now += seconds() if callable(seconds) else seconds

        return run


def next_call() -> Call:
    return Call((torch.zeros(1),))


def noisy(mean: float, share: float, seed: int) -> Callable[[], float]:
    generator = random.Random(seed)
    return lambda: mean * (1.0 + share * (2.0 * generator.random() - 1.0))


@pytest.mark.parametrize("seconds", [10e-6, 150e-6, 5e-3, 2.0, 60.0])
def test_a_steady_ratio_is_measured_at_any_scale(seconds: float) -> None:
    clock = Clock()
    timing = paired(
        clock.work("b", 2 * seconds),
        clock.work("c", seconds),
        next_call,
        seconds=1.0,
        min_pairs=3,
        timer=clock,
    )
    assert timing.ratio == pytest.approx(2.0)
    assert timing.low == pytest.approx(2.0) and timing.high == pytest.approx(2.0)
    assert timing.baseline_seconds == pytest.approx(2 * seconds)
    assert timing.candidate_seconds == pytest.approx(seconds)
    assert timing.faster and timing.drift == pytest.approx(1.0)


def test_short_calls_are_repeated_inside_one_span() -> None:
    clock = Clock()
    short = paired(clock.work("b", 10e-6), clock.work("c", 10e-6), next_call, seconds=0.01, timer=clock)
    assert short.repeats >= 20
    long = paired(clock.work("b", 1e-3), clock.work("c", 1e-3), next_call, seconds=0.05, timer=clock)
    assert long.repeats == 1
    flushed = paired(
        clock.work("b", 10e-6),
        clock.work("c", 10e-6),
        next_call,
        seconds=0.01,
        timer=clock,
        flush=lambda: None,
    )
    assert flushed.repeats == 1


def test_drift_hits_both_sides_and_is_reported() -> None:
    clock = Clock()

    def heating(factor: float) -> Callable[[], float]:
        return lambda: factor * 1e-3 * (1.0 + (clock.now - 100.0) * 5.0)

    timing = paired(
        clock.work("b", heating(1.5)),
        clock.work("c", heating(1.0)),
        next_call,
        seconds=0.5,
        max_pairs=100,
        timer=clock,
    )
    assert timing.ratio == pytest.approx(1.5, rel=0.05)
    assert timing.drift > 1.02


def test_equal_sides_are_rarely_called_faster() -> None:
    """A 95 % interval errs on either side in 1 case of 40; looking early must not make that much worse."""
    wrong = 0
    for seed in range(200):
        clock = Clock()
        timing = paired(
            clock.work("b", noisy(1e-3, 0.2, seed)),
            clock.work("c", noisy(1e-3, 0.2, seed + 1000)),
            next_call,
            seconds=0.1,
            timer=clock,
            seed=seed,
        )
        wrong += timing.faster
        assert timing.low <= timing.ratio <= timing.high and timing.noise > 0.0
    assert wrong <= 12


def test_a_gain_that_the_time_leaves_open_is_looked_at_for_longer() -> None:
    def timed(patience: float, gain: float = 1.15) -> Timing:
        clock = Clock()
        return paired(
            clock.work("b", noisy(gain * 1e-3, 0.6, 1)),
            clock.work("c", noisy(1e-3, 0.6, 2)),
            next_call,
            seconds=0.02,
            patience=patience,
            timer=clock,
        )

    short, longer = timed(0.0), timed(1.0)
    assert short.ratio > 1.03 and not short.faster
    assert longer.faster and longer.pairs > 2 * short.pairs
    clock = Clock()
    same = clock.work("b", 1e-3), clock.work("c", 1e-3)
    assert paired(*same, next_call, seconds=0.02, patience=1.0, timer=clock).pairs <= 12


def test_looking_longer_finds_no_winner_among_equals() -> None:
    wrong = 0
    for seed in range(200):
        clock = Clock()
        timing = paired(
            clock.work("b", noisy(1e-3, 0.6, seed)),
            clock.work("c", noisy(1e-3, 0.6, seed + 1000)),
            next_call,
            seconds=0.03,
            patience=0.2,
            timer=clock,
            seed=seed,
        )
        wrong += timing.faster
    assert wrong <= 12


def test_a_gain_within_noise_is_found_with_enough_pairs() -> None:
    clock = Clock()
    timing = paired(
        clock.work("b", noisy(1.1e-3, 0.1, 1)),
        clock.work("c", noisy(1e-3, 0.1, 2)),
        next_call,
        seconds=1.0,
        timer=clock,
    )
    assert timing.faster and 1.05 < timing.ratio < 1.15


def test_a_clear_loser_is_dropped_early() -> None:
    clock = Clock()
    timing = paired(
        clock.work("b", 1e-3), clock.work("c", 3e-3), next_call, seconds=100.0, min_pairs=7, timer=clock
    )
    assert timing.high < 1.0 and timing.pairs < 20


def test_outliers_do_not_decide() -> None:
    clock = Clock()
    count = iter(range(10_000))
    spikes = clock.work("c", lambda: 1e-3 if next(count) % 10 else 1.0)
    timing = paired(clock.work("b", 1.2e-3), spikes, next_call, seconds=30.0, max_pairs=60, timer=clock)
    assert timing.ratio == pytest.approx(1.2) and timing.faster


def test_the_order_within_pairs_is_mixed() -> None:
    clock = Clock()
    paired(
        clock.work("b", noisy(1e-3, 0.5, 1)),
        clock.work("c", noisy(1e-3, 0.5, 2)),
        next_call,
        seconds=0.2,
        timer=clock,
    )
    firsts = clock.calls[0::2]
    assert 0.25 < firsts.count("b") / len(firsts) < 0.75
    assert clock.calls.count("b") == clock.calls.count("c")


def test_the_deadline_ends_it_with_what_is_in() -> None:
    clock = Clock()
    timing = paired(
        clock.work("b", 10.0),
        clock.work("c", 5.0),
        next_call,
        seconds=1000.0,
        deadline=clock.now + 20,
        timer=clock,
    )
    assert timing.pairs == 2 and not timing.faster and (timing.low, timing.high) == (0.0, math.inf)
    assert clock.now <= 100.0 + 30


def test_every_call_is_fresh_and_each_side_has_its_own() -> None:
    seen: dict[str, list[Call]] = {"b": [], "c": []}
    clock = Clock()
    numbers = iter(range(10_000))

    def side(name: str) -> Callable[..., None]:
        def run(x: torch.Tensor) -> None:
            seen[name].append(Call((x.clone(),)))
            x.add_(1000)  # must not reach the other side
            clock.now += 1e-3

        return run

    paired(
        side("b"), side("c"), lambda: Call((torch.tensor(float(next(numbers))),)), seconds=0.02, timer=clock
    )
    values = [float(call.args[0]) for call in seen["b"]]
    assert values == [float(call.args[0]) for call in seen["c"]]
    assert len(set(values)) == len(values) and max(values) < 1000


def test_drawing_and_flushing_are_outside_of_the_timed_span() -> None:
    clock = Clock()

    def slow_draw() -> Call:
        clock.now += 5.0
        return next_call()

    def flush() -> None:
        clock.now += 1.0

    timing = paired(
        clock.work("b", 2e-3),
        clock.work("c", 1e-3),
        slow_draw,
        seconds=30.0,
        min_pairs=3,
        flush=flush,
        timer=clock,
    )
    assert timing.ratio == pytest.approx(2.0) and timing.candidate_seconds == pytest.approx(1e-3)


def test_work_on_a_side_stream_is_waited_for() -> None:
    clock = Clock()
    pending = [0.0]

    def lazy(*args: Any) -> None:
        pending[0] += 4e-3

    def synchronize() -> None:
        clock.now += pending[0]
        pending[0] = 0.0

    timing = paired(
        clock.work("b", 2e-3), lazy, next_call, seconds=0.1, min_pairs=3, synchronize=synchronize, timer=clock
    )
    assert timing.ratio == pytest.approx(0.5)


def test_garbage_collection_is_off_inside_and_as_before_outside() -> None:
    clock = Clock()
    states = []

    def run(*args: Any) -> None:
        states.append(gc.isenabled())
        clock.now += 1e-3

    assert gc.isenabled()
    paired(run, run, next_call, seconds=0.01, timer=clock)
    assert states and not any(states) and gc.isenabled()

    def fails(*args: Any) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        paired(run, fails, next_call, timer=clock)
    assert gc.isenabled()


def test_one_function_is_measured_alone() -> None:
    clock = Clock()
    measured = measure(clock.work("f", 3e-3), next_call, seconds=0.05, timer=clock)
    assert measured.seconds == pytest.approx(3e-3) and measured.low <= measured.seconds <= measured.high
    assert measure(clock.work("f", 10e-6), next_call, seconds=0.01, timer=clock).repeats >= 20
    slow = measure(clock.work("f", 30.0), next_call, deadline=clock.now + 10.0, timer=clock)
    assert slow.spans == 1


def test_intervals_are_deterministic_and_modest_for_few_values() -> None:
    values = [1.0, 1.1, 1.2, 0.9, 1.05, 1.3, 1.15, 0.95]
    assert interval(values, seed=3) == interval(values, seed=3)
    assert interval([1.0, 2.0]) == (0.0, math.inf)
    assert interval([1.0, 2.0, 3.0]) == (1.0, 3.0)
    low, high = interval(values)
    assert 0.9 <= low < 1.075 < high <= 1.3


def test_impossible_numbers_of_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="min_pairs"):
        paired(print, print, next_call, min_pairs=5, max_pairs=3)


def test_real_time_flows_too() -> None:
    flush = cache_flusher(1)
    timing = paired(torch.relu, torch.relu, next_call, seconds=0.01, min_pairs=3, max_pairs=5, flush=flush)
    assert timing.pairs >= 3 and timing.baseline_seconds > 0.0 and timing.to_dict()["ratio"] == timing.ratio


class Cores(Clock):
    """Calls of one library take 2 ms more where one of the other ended less than 3 ms ago."""

    def library(self, name: str, seconds: float) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            others = [end for other, end in self.ends.items() if other != name]
            busy = any(self.now - end < 3e-3 for end in others)
            self.now += seconds + (2e-3 if busy and name == "slowed" else 0.0)
            self.ends[name] = self.now
            self.calls.append(name)

        return run

    def __init__(self) -> None:
        super().__init__()
        self.ends: dict[str, float] = {}


@pytest.mark.parametrize(("seconds", "settled"), [(1e-3, True), (8e-3, True), (0.2, False)])
def test_what_the_other_side_left_on_the_cores_is_over(seconds: float, settled: bool) -> None:
    """Else a library whose threads wait busily for more work would slow down whatever is compared with it."""

    def ratio(settle: float) -> float:
        clock = Cores()
        sides = clock.library("spins", seconds), clock.library("slowed", seconds)
        timing = paired(*sides, next_call, seconds=4.0, min_pairs=7, timer=clock, settle=settle)
        return timing.ratio

    assert ratio(0.0) < 0.995
    assert (ratio(4e-3) == pytest.approx(1.0)) is settled


def test_how_many_calls_settle() -> None:
    assert settling("cpu") == 4e-3 and settling("cuda") == 0.0
    assert settling_calls((0.0, 0.0), 4e-3) == (0, 0), "before anything is known"
    assert settling_calls((1e-3, 5e-3), 4e-3) == (4, 1)
    assert settling_calls((0.1, 0.05), 4e-3) == (1, 1), "both, or one side alone would be warm"
    assert settling_calls((1.0, 0.05), 4e-3) == (0, 1)
    assert settling_calls((0.1, 0.07), 4e-3) == (0, 0)
    assert settling_calls((1e-3, 1e-3), 0.0) == (0, 0)


def test_calls_that_settle_are_no_others_and_few() -> None:
    clock, seen = Clock(), []

    def side(name: str, seconds: float) -> Callable[..., None]:
        work = clock.work(name, seconds)

        def run(x: torch.Tensor) -> None:
            seen.append((name, float(x)))
            x.fill_(-1.0)
            work()

        return run

    numbers = iter(range(10_000))
    timing = paired(
        side("b", 2.1e-3),
        side("c", 1.0),
        lambda: Call((torch.tensor(float(next(numbers))),)),
        seconds=12.0,
        min_pairs=3,
        warmup=1,
        timer=clock,
        settle=4e-3,
    )
    assert timing.pairs >= 3 and all(x >= 0.0 for _, x in seen), "each call has tensors of its own"
    drawn = {x for _, x in seen}
    assert sum(name == "c" for name, _ in seen) == len(drawn), "calls of a second do not need it"
    assert sum(name == "b" for name, _ in seen) == 3 * len(drawn) - 2, "two calls before all but the first"
