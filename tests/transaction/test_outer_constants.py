"""Constants and counters on no module: globals, classes, defaults that a forward reads or writes."""

from __future__ import annotations

import types

import pytest
import torch

import kpt
from slow_models import DirectScale, SlowScale, plugin
from subtle_passes import Captured
from watched_models import reasons

GAIN = 2.0
SETTINGS = {"shift": 1.0}
OPTIONS = types.SimpleNamespace(power=1)
CALLS = 0
STATISTICS = {"calls": 0}


def times_gain(x: torch.Tensor) -> torch.Tensor:
    return (x * GAIN + SETTINGS["shift"]) ** OPTIONS.power


class Reads(torch.nn.Module):
    """Reads what is on no module: a global of a function that it calls, its class, a default."""

    scale = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.slow = SlowScale(16)

    def forward(self, x):
        return times_gain(self.shifted(self.slow(x)) * self.scale)

    def shifted(self, x):
        return x + getattr(self, "shift", 1.0)


class ReadsInside(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Reads()

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    "change",
    [
        lambda m, patch: patch.setitem(globals(), "GAIN", 3.0),
        lambda m, patch: patch.setitem(globals(), "GAIN", torch.tensor([1.0, 3.0] * 8)),
        lambda m, patch: patch.setitem(SETTINGS, "shift", 3.0),
        lambda m, patch: patch.setattr(OPTIONS, "power", 2),
        lambda m, patch: patch.setattr(Reads, "scale", 3.0),
        lambda m, patch: setattr(m.inner, "scale", 3.0),
        lambda m, patch: setattr(m.inner, "shift", 3.0),
        lambda m, patch: setattr(m.inner, "shifted", lambda x: x),
    ],
    ids=[
        "a global",
        "a tensor for a global",
        "a global dict",
        "a global object",
        "a class",
        "in place of the class's",
        "in place of a default",
        "a method",
    ],
)
def test_a_constant_that_is_on_no_module_and_one_that_comes_later_are_noticed(change, monkeypatch):
    model, x = ReadsInside().eval(), torch.randn(8, 16)
    kpt.optimize(model, x, plugins=[plugin(Captured)], budget=20, cache=False)
    assert kpt.report(model).optimized, kpt.report(model)
    with torch.no_grad():
        before = model(x)
        change(model, monkeypatch)
        changed = model(x)
        assert torch.equal(changed, ReadsInside.forward(model, x)) and not torch.equal(changed, before)
    assert kpt.report(model).calls["optimized"] == 1 and list(reasons(model).values()) == [1]


class CountsInAnObject(torch.nn.Module):
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.slow = SlowScale(16)
        self.statistics = types.SimpleNamespace(calls=0)

    def forward(self, x):
        self.count()
        return self.slow(x) * GAIN

    def count(self) -> None:
        self.statistics.calls += 1

    def counted(self) -> int:
        return CALLS + STATISTICS["calls"] + type(self).calls + self.statistics.calls


class CountsGlobally(CountsInAnObject):
    def count(self) -> None:
        global CALLS
        CALLS += 1


class CountsInADictionary(CountsInAnObject):
    def count(self) -> None:
        STATISTICS["calls"] += 1


class CountsOnItsClass(CountsInAnObject):
    def count(self) -> None:
        type(self).calls += 1


@pytest.mark.parametrize("made_by", [Captured, DirectScale])
@pytest.mark.parametrize("cls", [CountsGlobally, CountsInADictionary, CountsOnItsClass, CountsInAnObject])
def test_a_plan_counts_calls_as_the_model_does_or_is_rejected(cls, made_by):
    model, x = cls().eval(), torch.randn(8, 16)
    kpt.optimize(model, x, plugins=[plugin(made_by)], budget=20, cache=False)
    report = kpt.report(model)
    before = model.counted()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    assert model.counted() == before + 3
    if made_by is DirectScale:
        assert report.optimized and kpt.report(model).calls["optimized"] == 3, report


step, gain = 0, 2.0


def loss(y: torch.Tensor) -> float:
    """Of the training loop, and nothing that the model calls: it has an attribute of that name."""
    return float(y.mean()) * gain


class NamesLikeAScripts(torch.nn.Module):
    """Its attributes are called as globals of the script are, which a loop around it counts up."""

    def __init__(self) -> None:
        super().__init__()
        self.step = SlowScale(16)
        self.loss = torch.nn.Identity()

    def forward(self, x):
        return self.loss(self.step(x)) * [one * 2.0 for one in (1.0,)][0]


class AsksForItsGlobals(NamesLikeAScripts):
    def forward(self, x):
        return super().forward(x) * (1 + globals()["step"])


@pytest.mark.parametrize("kind", [NamesLikeAScripts, AsksForItsGlobals])
def test_globals_that_only_share_a_name_with_an_attribute_are_not_watched(kind, monkeypatch):
    model, x = kind().eval(), torch.randn(32, 16)
    kpt.optimize(model, x, plugins=[plugin(DirectScale)], budget=20, cache=False)
    assert kpt.report(model).optimized, kpt.report(model).reason
    with torch.no_grad():
        for number in range(3):
            monkeypatch.setitem(globals(), "step", number)
            monkeypatch.setitem(globals(), "gain", float(number))
            twin = kind().eval()
            twin.load_state_dict(model.state_dict())
            torch.testing.assert_close(model(x), twin(x))
    calls = kpt.report(model).calls
    assert (calls["optimized"], calls["fallback"]) == ((3, 0) if kind is NamesLikeAScripts else (1, 2))
