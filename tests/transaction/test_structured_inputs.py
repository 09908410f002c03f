"""Inputs in named tuples and dataclasses of the user's own: served by plans, told apart by their fields."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import pytest
import torch

import kpt
from fingerprints import fallbacks, fast_calls, optimized
from kpt.compiling import call_structure
from slow_models import DirectScale, SlowScale, plugin
from subtle_passes import Captured


class Pair(NamedTuple):
    x: torch.Tensor
    scale: float = 1.0
    more: list[torch.Tensor] = []


class OtherPair(NamedTuple):
    x: torch.Tensor
    scale: float = 1.0
    more: list[torch.Tensor] = []


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    scale: float = 1.0
    more: list[torch.Tensor] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def rows(self) -> int:
        return len(self.x)


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    scale: float = 1.0
    more: tuple[torch.Tensor, ...] = ()


@dataclasses.dataclass
class Slots:
    __slots__ = ("x",)
    x: torch.Tensor


class Structured(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slow = SlowScale(16)

    def forward(self, given):
        out = self.slow(given.x) * getattr(given, "scale", 1.0)
        return out + sum(getattr(given, "more", ()))


FORMS = pytest.mark.parametrize("form", [Pair, Batch, Frozen])
PASSES = pytest.mark.parametrize("offered", [DirectScale, Captured], ids=["plain", "compiled"])


def right(model, given) -> bool:
    return torch.allclose(model(given), Structured.forward(model, given))


@FORMS
@PASSES
@torch.no_grad()
def test_calls_are_served(form, offered):
    example = form(torch.randn(32, 16), 1.0, [torch.randn(16)])
    model = optimized(Structured().eval(), (example,), plugins=[plugin(offered)])
    for number in (1, 2):
        assert right(model, form(torch.randn(32, 16), 1.0, [torch.randn(16)]))
        assert fast_calls(model) == number and not fallbacks(model)
    for other in (
        form(torch.randn(32, 16), 2.0, [torch.randn(16)]),
        form(torch.randn(32, 16), 1.0, []),
        form(torch.randn(31, 16), 1.0, [torch.randn(16)]),
        OtherPair(torch.randn(32, 16), 1.0, [torch.randn(16)]),
    ):
        assert right(model, other) and fast_calls(model) == 2


@FORMS
@PASSES
def test_so_are_calls_in_inference_mode_and_with_tensors_that_require_a_gradient(form, offered):
    model = optimized(Structured().eval(), (form(torch.randn(32, 16)),), plugins=[plugin(offered)])
    with torch.inference_mode():
        assert right(model, form(torch.randn(32, 16)))
    assert fast_calls(model) == 1 and not fallbacks(model)
    given = form(torch.randn(32, 16, requires_grad=True))
    model(given).sum().backward()
    twin = given.x.detach().clone().requires_grad_()
    Structured.forward(model, form(twin)).sum().backward()
    torch.testing.assert_close(given.x.grad, twin.grad)
    assert fast_calls(model) == 2 and not fallbacks(model)


@PASSES
@torch.no_grad()
def test_declared_dimensions_inside(offered):
    model = Structured().eval()
    shapes = {"given.x": {0: "rows"}}
    optimized(model, (Batch(torch.randn(32, 16)),), dynamic_shapes=shapes, plugins=[plugin(offered)])
    for rows in (5, 17):
        assert right(model, Batch(torch.randn(rows, 16)))
    # Code for other sizes than the example's there is for the one that the warm-up drew.
    assert fast_calls(model) == 2 if offered is DirectScale else fast_calls(model) <= 1


@torch.no_grad()
def test_a_dataclass_that_holds_more_than_its_fields_runs_the_original():
    model = optimized(Structured().eval(), (Batch(torch.randn(32, 16)),), plugins=[plugin(DirectScale)])
    given = Batch(torch.randn(32, 16))
    assert given.rows == 32
    assert right(model, given) and fast_calls(model) == 0
    assert "argument 'given' has an unsupported type Batch" in fallbacks(model)


def test_a_dataclass_with_slots_is_named():
    model = Structured().eval()
    kpt.optimize(model, (Slots(torch.randn(32, 16)),), plugins=[plugin(DirectScale)], budget=20, cache=False)
    assert "'given' has an unsupported type Slots" in kpt.report(model).reason


def test_a_dataclass_that_is_a_list_too_is_no_structure_of_its_fields():
    @dataclasses.dataclass
    class Tagged(list):
        tag: int

    assert call_structure.fields_of(Tagged(3)) is None
