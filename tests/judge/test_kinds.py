"""Which examples are of one kind, and that a figure over several kinds speaks for all of them."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kpt.judge.calls import Call, as_calls
from kpt.judge.clock import paired
from kpt.judge.draws import InputSpec
from kpt.judge.intervals import interval, middle, stratified_interval
from kpt.judge.kinds import Kind, alike, described, group, of_examples
from kpt.judge.load import Load
from kpt.judge.timing import Timing


def tokens(rows: int, width: int, *, padded: bool = False) -> dict[str, torch.Tensor]:
    mask = torch.ones(rows, width, dtype=torch.long)
    if padded:
        mask[0, width // 2 :] = 0
    return {"ids": torch.randint(5, 90, (rows, width)), "attention_mask": mask}


def grouped(*examples: Any) -> list[tuple[int, ...]]:
    return [each.examples for each in group(InputSpec.from_calls(as_calls(list(examples))))]


def test_calls_of_like_size_are_of_one_kind() -> None:
    assert grouped(*(torch.randn(rows, 8) for rows in (4, 5, 8, 6))) == [(0, 1, 3, 2)]


def test_sizes_apart_masks_that_mask_and_other_forms_are_kinds_of_their_own() -> None:
    assert grouped(torch.randn(32, 8), torch.randn(1, 8), torch.randn(30, 8)) == [(1,), (2, 0)]
    assert grouped(tokens(4, 16), tokens(4, 16, padded=True), tokens(4, 16)) == [(0, 2), (1,)]
    assert sorted(grouped((torch.randn(2, 3), True), (torch.randn(2, 3), False))) == [(0,), (1,)]
    assert sorted(grouped(torch.randn(2, 3), torch.randn(2, 3).double())) == [(0,), (1,)]
    x = torch.randn(2, 3)
    assert sorted(grouped(([x],), ((x,),))) == [(0,), (1,)]


def test_what_differs_from_call_to_call_makes_no_kinds() -> None:
    """Generators and functions have addresses in their text; a guidance scale is another number each time."""
    x = torch.randn(4, 8)
    assert len(grouped(*((x, torch.Generator()) for _ in range(6)))) == 1
    assert len(grouped(*((x, 0.1 * step, step) for step in range(6)))) == 1


def test_more_kinds_than_the_clock_can_see_join_their_neighbours() -> None:
    sizes = [1, 10, 100, 250, 1000, 10_000]
    kinds = grouped(*(torch.randn(size) for size in sizes))
    assert kinds == [(0,), (1,), (2, 3, 4), (5,)]


def drawing(*examples: Any) -> tuple[Kind, ...]:
    spec = InputSpec.from_calls(as_calls(list(examples)))
    generator = torch.Generator().manual_seed(0)
    return of_examples(spec, lambda picked: spec.draw(generator, examples=picked, own_masks=True))


def test_a_kind_is_named_by_its_shapes_and_draws_its_own_calls() -> None:
    single, batch = drawing(torch.randn(20, 8), torch.randn(1, 8), torch.randn(32, 8))
    assert single.label == "1x8 (example 1)" and batch.label == "20x8 to 32x8 (examples 0, 2)"
    assert single.share == pytest.approx(1 / 3) and batch.share == pytest.approx(2 / 3)
    assert {len(single.next_call().args[0]) for _ in range(5)} == {1}
    assert {len(batch.next_call().args[0]) for _ in range(20)} == {20, 32}
    (many,) = drawing(*(torch.tensor(float(i)) for i in range(6)))
    assert many.label == "scalar (examples 0, 1, 2, 3, ...)"
    (bare,) = group(InputSpec.from_calls([Call((1,)), Call((2,))]))
    assert bare.label == "no tensor (examples 0, 1)"


def test_calls_without_padding_are_drawn_without_and_those_with_it_with() -> None:
    """The shape of a mask is learnt from all examples, of which some are padded here."""
    plain, padded = drawing(*[tokens(4, 16)] * 5, *[tokens(4, 16, padded=True)] * 2)
    assert plain.label == "4x16 (examples 0, 1, 2, 3, ...)" and padded.label == "4x16 padded (examples 5, 6)"
    for _ in range(10):
        assert bool(plain.next_call().kwargs["attention_mask"].all())
        assert not bool(padded.next_call().kwargs["attention_mask"].all())
    single, batch = drawing(tokens(1, 16), tokens(8, 16, padded=True))
    assert bool(single.next_call().kwargs["attention_mask"].all()) and "padded" in batch.label


def test_masks_of_any_rank_are_as_those_of_the_kind() -> None:
    """Calls in which one mask keeps all and another does not are none of the user's."""

    def both(padded: bool) -> dict[str, torch.Tensor]:
        mask = tokens(4, 16, padded=padded)["attention_mask"]
        return {"attention_mask": mask, "cross_attention_mask": mask[:, None, None, :].clone()}

    plain, padded = drawing(both(False), both(False), both(True), both(True))
    for some, whole in ((plain, True), (padded, False)):
        for _ in range(6):
            assert {bool(mask.all()) for mask in some.next_call().kwargs.values()} == {whole}


def test_a_mask_that_masks_follows_none_that_keeps_all() -> None:
    def example(decoder_padded: bool) -> dict[str, torch.Tensor]:
        own = tokens(4, 16, padded=decoder_padded)["attention_mask"]
        other = tokens(4, 16, padded=True)["attention_mask"]
        return {"decoder_attention_mask": own, "cross_attention_mask": other[:, None, None, :].clone()}

    first, second = example(False), example(True)
    for some in drawing(first, first, second, second):
        for _ in range(6):
            assert not bool(some.next_call().kwargs["cross_attention_mask"].all())


def mixture(*examples: Any) -> Any:
    return described(InputSpec.from_calls(as_calls(list(examples))))


def test_mixtures_of_calls_are_alike_within_a_factor_of_two_in_size_and_a_quarter_in_share() -> None:
    def rows(*numbers: int) -> Any:
        return mixture(*(torch.randn(n, 8) for n in numbers))

    first = rows(1, 1, 32, 32)
    assert alike(first, rows(1, 40, 1, 30)) and alike(first, rows(1, 1, 1, 32))
    assert not alike(first, rows(1, 32, 32, 32, 32, 32, 32, 32))
    assert not alike(first, rows(32, 32)) and not alike(first, rows(1, 1, 200, 200))
    for broken in (None, 3, [1], [["a", "b"]], [[1.0]], {}):
        assert not alike(broken, first)


def test_a_mixture_of_many_forms_is_the_same_in_any_order() -> None:
    """More kinds of one size than the clock can see join their neighbours, in any order of theirs."""
    x = torch.randn(2, 3)
    examples = [(x, word) for word in "abcdefg"]
    assert mixture(*examples) == mixture(*reversed(examples)) == mixture(*examples[3:], *examples[:3])


def test_mixtures_of_other_forms_or_paddings_are_not_alike_whatever_the_order() -> None:
    plain, padded = tokens(4, 16), tokens(4, 16, padded=True)
    assert not alike(mixture(plain, plain), mixture(padded, padded))
    assert not alike(mixture(*[plain] * 7, padded), mixture(*[padded] * 7, plain))
    assert alike(mixture(plain, plain, plain, padded), mixture(padded, plain, plain, plain))
    x = torch.randn(2, 3)
    assert not alike(mixture((x, True)), mixture((x, False)))


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
    assert timing.baseline_seconds == pytest.approx((5 * 0.01 + 2 * 0.25) / 7)
    assert timing.to_dict()["kinds"][0]["share"] == 5 / 7


def test_a_loss_of_the_fewer_calls_outweighs_a_little_gain_of_the_others() -> None:
    clock = Clock()
    kinds = [kind("short", 0.75, 0.01), kind("long", 0.25, 0.25)]
    timing = paired(
        clock.side(lambda x: 1.0), clock.side(lambda x: 3.0 if x > 0.1 else 0.9), kinds, timer=clock
    )
    assert timing.high < 1.0 and not timing.faster


def test_what_makes_all_calls_together_longer_is_not_faster() -> None:
    clock = Clock()
    kinds = [kind("short", 0.75, 0.01), kind("long", 0.25, 0.25)]
    timing = paired(
        clock.side(lambda x: 1.0), clock.side(lambda x: 1.2 if x > 0.1 else 0.5), kinds, timer=clock
    )
    assert timing.low > 1.5 and timing.longer and not timing.faster
    assert timing.total == pytest.approx(70 / 78.75)
    assert "all calls together take longer: 0.89x in seconds" in timing.doubt


@pytest.mark.parametrize(("long", "most"), [(1.11, 1), (1.05, 10)])
def test_a_noisy_slow_kind_that_became_slower_refuses_what_makes_all_calls_longer(
    long: float, most: int
) -> None:
    """The short calls gain by half. One lucky pair of three long ones had been enough to hide their loss."""
    accepted = 0
    for seed in range(30):
        clock, generator = Clock(), random.Random(seed)
        kinds = [kind("short", 0.5, 1e-3), kind("long", 0.5, 0.1)]

        def noisy(factor: Callable[[float], float], generator: random.Random, x: float) -> float:
            return factor(x) * generator.lognormvariate(0.0, 0.05)

        before = clock.side(lambda x, g=generator: noisy(lambda x: 1.5 if x < 0.05 else 1.0, g, x))  # type: ignore[misc]
        after = clock.side(lambda x, g=generator: noisy(lambda x: 1.0 if x < 0.05 else long, g, x))  # type: ignore[misc]
        timing = paired(before, after, kinds, seconds=1.5, patience=3.0, timer=clock, seed=seed)
        assert timing.low > 1.0
        accepted += timing.faster
    assert accepted <= most


def test_noise_on_a_slow_kind_that_stays_as_it_was_refuses_no_gain() -> None:
    """It is most of the time, and has the fewest pairs."""
    refused = 0
    for seed in range(40):
        clock, generator = Clock(), random.Random(seed)

        def factor(gain: float, generator: random.Random, x: float) -> float:
            return (gain if x < 0.1 else 1.0) * (1.0 + 0.04 * (2.0 * generator.random() - 1.0))

        kinds = [kind("short", 0.75, 1e-3), kind("long", 0.25, 0.25)]
        before = clock.side(lambda x, generator=generator: factor(2.0, generator, x))  # type: ignore[misc]
        after = clock.side(lambda x, generator=generator: factor(1.0, generator, x))  # type: ignore[misc]
        timing = paired(before, after, kinds, seconds=2.0, timer=clock, seed=seed)
        assert timing.low > 1.0
        refused += not timing.faster
    assert refused <= 6


def test_pairs_go_where_they_tell_most_for_their_time() -> None:
    """A rare, slow kind must not keep the common one from its pairs."""
    clock = Clock()
    kinds = [kind("common", 7 / 8, 1e-3), kind("rare", 1 / 8, 0.25)]
    timing = paired(clock.side(lambda x: 1.0), clock.side(lambda x: 1.0), kinds, seconds=3.0, timer=clock)
    common, rare = timing.kinds
    assert rare.pairs >= 3 and common.pairs > 50 * rare.pairs


def test_what_a_pair_of_very_short_calls_takes_is_that_of_all_its_repeats() -> None:
    clock = Clock()
    kinds = [kind("short", 0.5, 1e-5), kind("long", 0.5, 1e-2)]
    timing = paired(clock.side(lambda x: 1.0), clock.side(lambda x: 1.0), kinds, seconds=2.0, timer=clock)
    short, long = timing.kinds
    assert 4 * long.pairs < short.pairs < 10 * long.pairs  # 7.1 by the square root of 10 over 0.2 ms


def test_each_kind_has_its_own_repeats() -> None:
    clock = Clock()
    kinds = [kind("short", 0.5, 1e-5), kind("long", 0.5, 1e-2)]
    calls: list[float] = []

    def counted(x: torch.Tensor) -> None:
        calls.append(float(x))
        clock.now += float(x)

    timing = paired(counted, clock.side(lambda x: 1.0), kinds, seconds=0.5, timer=clock)
    short, long = timing.kinds
    assert calls.count(1e-5) > 10 * short.pairs and calls.count(1e-2) <= long.pairs + 2
    assert timing.repeats == 1


def test_slow_kinds_have_three_pairs_each_of_which_the_first_is_the_warm_up() -> None:
    kinds = [kind(str(i), 0.25, 60.0 + i) for i in range(4)]
    clock = Clock()
    timing = paired(clock.side(lambda x: 2.0), clock.side(lambda x: 1.0), kinds, seconds=1.0, timer=clock)
    assert [each.pairs for each in timing.kinds] == [3, 3, 3, 3] and timing.faster
    assert clock.now == pytest.approx(3 * 3 * sum(60.0 + i for i in range(4)))


def test_a_deadline_leaves_the_range_of_what_is_in_or_nothing_where_a_kind_was_not_reached() -> None:
    kinds = [kind(str(i), 0.25, float(i)) for i in (1, 2, 4, 6)]

    def timed(deadline: float) -> Timing:
        clock, generator = Clock(), random.Random(0)
        slower = clock.side(lambda x: 1.5 + 0.03 * generator.random())
        return paired(slower, clock.side(lambda x: 1.0), kinds, deadline=deadline, timer=clock)

    late = timed(50.0)
    assert [each.pairs for each in late.kinds] == [2, 2, 2, 1]
    assert late.told and late.faster and 1.5 <= late.low < late.ratio < late.high < 1.53
    early = timed(10.0)
    assert [each.label for each in early.kinds] == ["1", "2", "4"]
    assert not early.told and not early.faster and (early.low, early.high) == (0.0, math.inf)


def test_most_of_all_calls_are_not_judged_by_three_of_them() -> None:
    kinds = [kind("few", 1 / 8, 1.0), kind("most", 7 / 8, 60.0)]
    clock = Clock()
    timing = paired(clock.side(lambda x: 1.0), clock.side(lambda x: 1.0), kinds, seconds=1.0, timer=clock)
    assert [each.pairs for each in timing.kinds] == [3, 5]


def test_impossible_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="at least, got none"):
        paired(print, print, [])
    with pytest.raises(ValueError, match="3 kinds of calls want 9 pairs, got max_pairs=8"):
        paired(print, print, [kind(str(i), 1 / 3, 1.0) for i in range(3)], max_pairs=8)


def test_a_gain_of_a_small_share_is_looked_at_for_longer() -> None:
    """It is 2 % of all, which is not worth a second look; of its own calls it is a fifth."""

    def timed(gain: float) -> Timing:
        clock, generator = Clock(), random.Random(1)

        def factor(gain: float, x: float) -> float:
            return (gain if x > 2e-3 else 1.0) * (1.0 + 0.1 * (2.0 * generator.random() - 1.0))

        kinds = [kind("common", 7 / 8, 1e-3), kind("rare", 1 / 8, 5e-3)]
        before = clock.side(lambda x: factor(gain, x))
        return paired(
            before, clock.side(lambda x: factor(1.0, x)), kinds, seconds=0.1, patience=2.0, timer=clock
        )

    helped = timed(1.2)
    assert helped.faster and helped.pairs > 2 * timed(1.0).pairs


def test_several_callers_at_once_have_calls_of_one_kind() -> None:
    spans: list[list[float]] = []
    lock = threading.Lock()

    def run(x: torch.Tensor) -> None:
        with lock:
            spans[-1].append(float(x))

    kinds = [kind("small", 0.5, 1.0), kind("large", 0.5, 2.0)]
    timing = paired(
        run,
        run,
        kinds,
        max_pairs=8,
        load=Load(callers=2),
        synchronize=lambda: spans.append([]),  # before each span and after it
    )
    assert timing.repeats % 2 == 0 and len(timing.kinds) == 2
    assert all(len(set(span)) <= 1 for span in spans) and {len(set(span)) for span in spans} == {0, 1}


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
    assert stratified_interval([values, values[:2]], [0.5, 0.5]) == (0.9, 1.3)
    assert stratified_interval([values, []], [0.5, 0.5]) == (0.0, math.inf)
    assert stratified_interval([[1.0], [2.0]], [0.5, 0.5]) == (0.0, math.inf)
