"""Changes of what modules hold, and of modes around a call, that a plan has to notice."""

from __future__ import annotations

import types

import pytest
import torch

import kpt
from slow_models import DirectScale, SlowScale, net, plugin
from subtle_passes import Captured
from watched_models import Around, reasons


class DirectOuter(DirectScale):
    """Replaces the outer scale only, so that the inner one's attributes still count."""

    def apply(self, model, variant):
        from slow_models import fast_forward

        model.slow.forward = types.MethodType(fast_forward, model.slow)
        self.applied = 1
        return lambda: model.slow.__dict__.pop("forward", None)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.scaling.update(default=3.0),
        lambda m: setattr(m, "temperature", torch.tensor(2.0)),
        lambda m: m.temperature.mul_(2.0),
        lambda m: setattr(m.config, "double", True),
        lambda m: setattr(m.settings.inner, "triple", True),
    ],
    ids=[
        "an entry of a dict",
        "a tensor attribute",
        "a tensor in place",
        "a switch of the config",
        "an object in an object",
    ],
)
def test_a_change_of_what_a_submodule_holds_is_served_by_the_original(change):
    torch.manual_seed(0)
    model, x = Around().eval(), torch.randn(8, 16)
    kpt.optimize(model, x, plugins=[plugin(DirectOuter)], budget=20, cache=False)
    assert kpt.report(model).optimized
    change(model.inner)
    with torch.no_grad():
        assert torch.equal(model(x), type(model).forward(model, x))
    assert sum(reasons(model).values()) == 1


def test_another_autocast_dtype_is_served_by_the_original():
    model, x = net(), torch.randn(8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        kpt.optimize(model, x, plugins=[plugin(DirectScale)], budget=20, cache=False)
        if not kpt.report(model).optimized:
            pytest.skip("nothing was faster under autocast here")
        model(x)
    assert not reasons(model)
    with torch.autocast("cpu", dtype=torch.float16), torch.no_grad():
        model(x)
    assert any("autocast" in reason for reason in reasons(model))


class Counting(SlowScale):
    def __init__(self) -> None:
        super().__init__(16)
        self.seen: list[int] = []

    def forward(self, x):
        self.seen.append(len(x))
        return super().forward(x)


def test_a_forward_that_appends_to_a_list_is_left_alone():
    model, x = Counting().eval(), torch.randn(8, 16)
    kpt.optimize(model, x, plugins=[plugin(DirectScale)], budget=20, cache=False)
    receipt = kpt.report(model)
    assert not receipt.optimized and "seen" in receipt.reason
    assert model.seen == []


class MakesZeros(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slow = SlowScale(16)

    def forward(self, x):
        return self.slow(x) + torch.zeros(16)


def test_another_default_dtype_is_served_by_the_original():
    model, x = MakesZeros().eval(), torch.randn(8, 16)
    kpt.optimize(model, x, plugins=[plugin(Captured)], budget=20, cache=False)
    assert kpt.report(model).optimized, kpt.report(model)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            assert model(x).dtype is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert list(reasons(model)) == ["the default dtype is torch.float64; proven for torch.float32"]
    with torch.no_grad():
        assert model(x).dtype is torch.float32
    assert kpt.report(model).calls["optimized"] == 1
