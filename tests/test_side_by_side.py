"""The loop that demos and benchmarks time with pairs what it compares."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from side_by_side import race, ratio


def test_every_contender_gets_the_same_inputs_the_same_number_of_times() -> None:
    seen: dict[str, list[int]] = {"a": [], "b": []}
    samples = race({name: seen[name].append for name in seen}, lambda n: n, seconds=0.0, least_rounds=5)
    assert seen["a"] == seen["b"]
    assert len(set(seen["a"])) == len(seen["a"])  # no input comes twice
    assert [len(times) for times in samples.values()] == [5, 5]


def test_the_order_changes_from_round_to_round() -> None:
    order: list[str] = []

    def contender(name: str):
        def run(inputs: int) -> None:
            if not order or order[-1] != name:
                order.append(name)

        return run

    race({name: contender(name) for name in "abc"}, lambda n: n, seconds=0.0, least_rounds=30)
    rounds = [tuple(order[start : start + 3]) for start in range(3, 60, 3)]
    assert len(set(rounds)) > 1


def test_the_ratio_is_the_median_of_pairs_with_its_interval() -> None:
    slow = [2.0, 4.0, 8.0, 2.0, 6.0]
    found = ratio(slow, [value / 2 for value in slow])
    assert (found.median, found.low, found.high) == (2.0, 2.0, 2.0)
    noisy = ratio([1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0])
    assert noisy.median == pytest.approx(2.5)
    assert noisy.low < 2.5 < noisy.high
