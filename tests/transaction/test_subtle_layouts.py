"""Passes that are wrong only for some sizes, strides or masks, or where inputs share memory."""

from __future__ import annotations

import pytest
import torch

import kpt
import slow_models
import subtle_passes as subtle
from fingerprints import fallbacks, fast_calls, optimized
from slow_models import DirectScale, SlowScale, fast_forward, net, plugin
from subtle_passes import rule_of


def test_a_pass_serves_the_strides_that_it_was_proved_on_and_no_others():
    model = optimized(SlowScale().eval(), torch.randn(16, 32).t(), plugins=[plugin(subtle.ColumnMajor)])
    with torch.no_grad():
        for x, fast in ((torch.randn(16, 32).t(), 1), (torch.randn(32, 32)[:, ::2], 0)):
            before = fast_calls(model)
            assert torch.equal(model(x), fast_forward(model, x))
            assert fast_calls(model) == before + fast
    assert any("strides" in reason for reason in fallbacks(model))


def test_where_sizes_are_dynamic_the_kind_of_the_layout_decides():
    shapes = {"x": {0: "batch"}}
    model = optimized(
        SlowScale().eval(), torch.randn(32, 24)[:, :16], plugins=[plugin(DirectScale)], dynamic_shapes=shapes
    )
    with torch.no_grad():
        model(torch.randn(8, 20)[:, :16])  # rows of a wider tensor, as the example's
        assert fast_calls(model) == 1
        model(torch.randn(16, 8).t())
        model(torch.randn(8, 16, 1).expand(8, 16, 2)[..., 0])
        assert fast_calls(model) == 1


def test_both_bounds_of_every_dimension_are_judged():
    shapes = {"x": {0: ("batch", 1, 8), 1: ("sequence", 1, 64)}}
    offered = [plugin(subtle.WrongForLongSequences)]
    model = SlowScale().eval()
    kpt.optimize(
        model, torch.randn(4, 16, 16), plugins=offered, cache=False, budget=20.0, dynamic_shapes=shapes
    )
    assert [entry.rule for entry in kpt.report(model).rejected] == ["size"]


class Masked(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slow = SlowScale(16)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.slow(x) * mask.view(*mask.shape, *(1,) * (x.dim() - mask.dim()))


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(4, 8, dtype=torch.int64),
        torch.ones(4, 8, dtype=torch.bool),
        torch.ones(4, 8),
        torch.ones(4),
        torch.ones(4, dtype=torch.bool),
        torch.ones((), dtype=torch.bool),
        torch.ones(4, 1),
    ],
    ids=["integers", "flags", "floats", "a row", "flags of rows", "one flag", "a column"],
)
def test_a_pass_that_leaves_out_a_mask_is_found_though_the_examples_mask_nothing(mask):
    model = Masked().eval()
    given = {"x": torch.randn(4, 8, 16), "mask": mask}
    kpt.optimize(model, given, plugins=[plugin(subtle.LeavesOut)], cache=False, budget=20.0)
    assert [entry.rule for entry in kpt.report(model).rejected] == ["mask"]
    optimized(model, given, plugins=[plugin(DirectScale)])


class InFours(torch.nn.Module):
    """Takes four rows of x for each of y, and no other number."""

    def __init__(self, factors: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)) -> None:
        super().__init__()
        self.slow = SlowScale(16)
        self.factors = factors

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if len(x) != 4 * len(y) or len(y) not in self.factors:
            raise ValueError("four rows of x for each of y are expected")
        return self.slow(x).view(len(y), 4, 16) * y[:, None, None]


def test_sizes_that_only_fit_together_are_judged_in_proportion():
    shapes, calls = {"x": {0: "rows"}, "y": {0: "groups"}}, (torch.randn(16, 16), torch.randn(4))
    model = kpt.optimize(
        InFours().eval(),
        calls,
        plugins=[plugin(subtle.RightForSixteenRows)],
        cache=False,
        budget=20.0,
        dynamic_shapes=shapes,
    )
    assert [entry.rule for entry in kpt.report(model).rejected] == ["size"]
    optimized(model, calls, plugins=[plugin(DirectScale)], dynamic_shapes=shapes)
    assert not kpt.report(model).notes
    model = InFours((4,)).eval()
    optimized(model, calls, plugins=[plugin(DirectScale)], dynamic_shapes=shapes)
    assert "only the examples' sizes were judged" in " ".join(kpt.report(model).notes)


def test_a_conjugate_is_not_taken_for_its_tensor():
    example = torch.randn(32, 16, dtype=torch.complex64)
    model = optimized(subtle.ComplexSlow().eval(), example, plugins=[plugin(DirectScale)])
    with torch.no_grad():
        assert torch.equal(model(example.conj()), subtle.ComplexSlow.forward(model, example.conj()))
        assert fast_calls(model) == 0
        model(example)
    assert fast_calls(model) == 1


def test_inputs_that_share_memory_are_no_others_where_one_is_written_to():
    model, x = subtle.WritesItsInput().eval(), torch.randn(32, 16)
    optimized(model, (x, x.clone()), plugins=[plugin(subtle.CapturedAsFunction, phase="compile")])
    rows = torch.randn(33, 16)
    with torch.no_grad():
        for _ in range(2):
            model(x.clone(), x.clone())
        for first, second in ((slice(0, 32), slice(0, 32)), (slice(0, 32), slice(1, 33))):
            mine, own = rows.clone(), rows.clone()
            assert torch.equal(
                model(mine[first], mine[second]), type(model).forward(model, own[first], own[second])
            )
            assert torch.equal(mine, own)
    assert fast_calls(model) == 2
    assert sum(fallbacks(model).values()) == 2


@pytest.mark.parametrize(
    ("offered", "training", "rule"),
    [
        (subtle.WrongInInferenceMode, False, "value"),
        (subtle.AsksForTheVersion, False, "failed"),
        (subtle.WrongForOddAddresses, False, "value"),
        (subtle.WrongForOddAddresses, True, "value"),
        (DirectScale, False, "kept"),
        (DirectScale, True, "kept"),
    ],
)
def test_a_plan_is_judged_where_its_callers_may_be(offered, training, rule):
    """The guard serves calls in inference mode, and tensors that begin anywhere in their memory."""
    model = net(training=training)
    assert rule_of(model, offered, torch.randn(32, 16)) == rule
    if rule != "kept":
        assert "odd addresses" in kpt.report(model).rejected[0].reason


def test_a_model_that_refuses_inference_mode_is_not_judged_in_it():
    class Refuses(slow_models.Net):
        def forward(self, x):
            if torch.is_inference_mode_enabled():
                raise RuntimeError("not here")
            return super().forward(x)

    optimized(Refuses().eval(), torch.randn(32, 16), plugins=[plugin(DirectScale)])
