"""Which examples are of one kind, and that a figure over several kinds speaks for all of them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kpt.judge.calls import Call, as_calls
from kpt.judge.clock import paired
from kpt.judge.draws import InputSpec
from kpt.judge.intervals import interval, middle, stratified_interval
from kpt.judge.kinds import Kind, group, of_examples


def tokens(rows: int, width: int, *, padded: bool = False) -> dict[str, torch.Tensor]:
    mask = torch.ones(rows, width, dtype=torch.long)
    if padded:
        mask[0, width // 2 :] = 0
    return {"ids": torch.randint(5, 90, (rows, width)), "attention_mask": mask}


def grouped(*examples: Any) -> list[tuple[int, ...]]:
    return [numbers for _, numbers in group(InputSpec.from_calls(as_calls(list(examples))))]


def test_calls_of_like_size_are_of_one_kind() -> None:
    assert grouped(*(torch.randn(rows, 8) for rows in (4, 5, 8, 6))) == [(0, 1, 3, 2)]


def test_sizes_apart_masks_that_mask_and_other_forms_are_kinds_of_their_own() -> None:
    assert grouped(torch.randn(32, 8), torch.randn(1, 8), torch.randn(30, 8)) == [(1,), (2, 0)]
    assert grouped(tokens(4, 16), tokens(4, 16, padded=True), tokens(4, 16)) == [(0, 2), (1,)]
    assert grouped((torch.randn(2, 3), True), (torch.randn(2, 3), False)) == [(0,), (1,)]
    assert grouped(torch.randn(2, 3), torch.randn(2, 3).double()) == [(0,), (1,)]


def test_more_kinds_than_the_clock_can_see_join_their_neighbours() -> None:
    sizes = [1, 10, 100, 250, 1000, 10_000]
    kinds = grouped(*(torch.randn(size) for size in sizes))
    assert kinds == [(0,), (1,), (2, 3, 4), (5,)]


def test_a_kind_is_named_by_its_shapes_and_draws_its_own_calls() -> None:
    spec = InputSpec.from_calls(as_calls([torch.randn(1, 8), torch.randn(20, 8), torch.randn(32, 8)]))
    generator = torch.Generator().manual_seed(0)
    single, batch = of_examples(spec, lambda examples: spec.draw(generator, examples=examples))
    assert single.label == "1x8 (1 example)" and batch.label == "20x8 to 32x8 (2 examples)"
    assert single.share == pytest.approx(1 / 3) and batch.share == pytest.approx(2 / 3)
    assert {len(single.next_call().args[0]) for _ in range(5)} == {1}
    assert {len(batch.next_call().args[0]) for _ in range(20)} == {20, 32}


class Clock:
    """Time that only calls let pass, so many seconds as their input says."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def side(self, factor: Callable[[float], float]) -> Callable[[torch.Tensor], None]:
        def run(x: torch.Tensor) -> None:
            self.now += float(x) * factor(float(x))

        return run


def kind(label: str, share: float, seconds: float) -> Kind:
    return Kind(label, share, lambda: Call((torch.tensor(seconds, dtype=torch.float64),)))


def test_a_gain_for_the_fewer_calls_counts_with_their_share() -> None:
    clock = Clock()
    kinds = [kind("short", 5 / 7, 0.01), kind("long", 2 / 7, 0.25)]
    timing = paired(
        clock.side(lambda x: 1.0), clock.side(lambda x: 0.5 if x > 0.1 else 1.0), kinds, timer=clock
    )
    assert timing.ratio == pytest.approx(2 ** (2 / 7)) and timing.faster
    assert [(each.label, each.ratio) for each in timing.kinds] == [
        ("short", pytest.approx(1.0)),
        ("long", pytest.approx(2.0)),
    ]
    assert timing.kinds[1].candidate_seconds == pytest.approx(0.125)
    assert timing.baseline_seconds / timing.candidate_seconds == pytest.approx(timing.ratio)
    assert timing.to_dict()["kinds"][0]["share"] == 5 / 7


def test_a_loss_of_the_fewer_calls_outweighs_a_little_gain_of_the_others() -> None:
    clock = Clock()
    kinds = [kind("short", 0.75, 0.01), kind("long", 0.25, 0.25)]
    timing = paired(
        clock.side(lambda x: 1.0), clock.side(lambda x: 3.0 if x > 0.1 else 0.9), kinds, timer=clock
    )
    assert timing.high < 1.0 and not timing.faster


def test_each_kind_has_its_own_repeats_and_as_many_pairs() -> None:
    clock = Clock()
    kinds = [kind("short", 0.5, 1e-5), kind("long", 0.5, 1e-2)]
    calls: list[float] = []

    def counted(x: torch.Tensor) -> None:
        calls.append(float(x))
        clock.now += float(x)

    timing = paired(counted, clock.side(lambda x: 1.0), kinds, seconds=0.5, timer=clock)
    assert abs(timing.kinds[0].pairs - timing.kinds[1].pairs) <= 1 and timing.pairs >= 7
    assert calls.count(1e-5) > 10 * calls.count(1e-2) and timing.repeats == 1


def test_three_pairs_of_each_kind_are_wanted_and_less_claims_nothing() -> None:
    kinds = [kind(str(i), 0.25, 60.0 + i) for i in range(4)]
    clock = Clock()
    timing = paired(clock.side(lambda x: 2.0), clock.side(lambda x: 1.0), kinds, seconds=1.0, timer=clock)
    assert [each.pairs for each in timing.kinds] == [3, 3, 3, 3] and timing.faster
    clock = Clock()
    late = paired(clock.side(lambda x: 2.0), clock.side(lambda x: 1.0), kinds, deadline=400.0, timer=clock)
    assert late.pairs < 4 and (late.low, late.high) == (0.0, math.inf) and not late.faster
    assert late.ratio == pytest.approx(2.0)  # of the kinds that were reached
    with pytest.raises(ValueError, match="at least, got none"):
        paired(print, print, [])


def noise(generator: random.Random, share: float) -> float:
    spike = 3.0 if generator.random() < 0.05 else 0.0
    return 1.0 + spike + share * (2.0 * generator.random() - 1.0)


def test_equal_sides_on_several_kinds_are_rarely_called_faster() -> None:
    wrong = 0
    for seed in range(200):
        clock, generator = Clock(), random.Random(seed)
        kinds = [kind("a", 0.5, 1e-3), kind("b", 0.3, 5e-3), kind("c", 0.2, 2e-2)]
        side = clock.side(lambda x, generator=generator: noise(generator, 0.2))  # type: ignore[misc]
        timing = paired(side, side, kinds, seconds=0.3, patience=0.5, timer=clock, seed=seed)
        wrong += timing.faster
        assert timing.low <= timing.ratio <= timing.high
    assert wrong <= 12


def test_of_one_kind_the_figures_are_the_median_and_its_interval() -> None:
    values = [1.0, 1.1, 1.2, 0.9, 1.05, 1.3, 1.15, 0.95]
    assert middle([values], [1.0]) == pytest.approx(1.075)
    assert stratified_interval([values], [1.0], seed=3) == interval(values, seed=3)
    assert middle([[], [2.0, 3.0]], [0.5, 0.5]) == 2.5
    with pytest.raises(ValueError, match="a value in one group"):
        middle([[], []], [0.5, 0.5])
    assert stratified_interval([values, values[:2]], [0.5, 0.5]) == (0.0, math.inf)
