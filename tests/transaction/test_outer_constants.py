"""Constants and counters on no module: globals, classes, defaults that a forward reads or writes."""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

import pytest
import torch

import kpt
from fingerprints import optimized
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
this = sys.modules[__name__]


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
        self.loss.eval()
        return self.loss(self.step(x)) * [one * 2.0 for one in (1.0,)][0]  # a function up to 3.11


def test_globals_that_only_share_a_name_with_an_attribute_are_not_watched(monkeypatch):
    model, x = NamesLikeAScripts().eval(), torch.randn(32, 16)
    optimized(model, x, plugins=[plugin(DirectScale)], budget=20)
    with torch.no_grad():
        for number in range(3):
            monkeypatch.setitem(globals(), "step", number)
            monkeypatch.setitem(globals(), "gain", float(number))
            torch.testing.assert_close(model(x), NamesLikeAScripts.forward(model, x))
    calls = kpt.report(model).calls
    assert (calls["optimized"], calls["fallback"]) == (3, 0)


def times(x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    return x * gain * factor


def called(name: str) -> float:
    return globals()[name]


class Indirect(torch.nn.Module):
    """Reads the global ``gain`` in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = SlowScale(16)
        self.held: Any = times

    def forward(self, x):
        return self.held(self.slow(x))


class InAPartialCall(Indirect):
    def __init__(self) -> None:
        super().__init__()
        self.held = functools.partial(times, factor=2.0)


class InAList(Indirect):
    def __init__(self) -> None:
        super().__init__()
        self.held = [times]

    def forward(self, x):
        return self.held[0](self.slow(x))


class ByAnAlias(Indirect):
    def forward(self, x):
        return self.slow(x) * this.gain


class AsAMethod(Indirect):
    def __init__(self) -> None:
        super().__init__()
        self.held = self._scaled

    def _scaled(self, x):
        return x * gain


class AsAModule(Indirect):
    def __init__(self) -> None:
        super().__init__()
        self.held = this

    def forward(self, x):
        return self.held.times(self.slow(x))


class ByAnAliasOfAFunctionsModule(Indirect):
    def forward(self, x):
        return this.times(self.slow(x))


class ByAnImport(Indirect):
    def forward(self, x):
        import outer_settings

        return outer_settings.times(self.slow(x))


class BySys(Indirect):
    def forward(self, x):
        import sys as system

        return self.slow(x) * system.modules[__name__].gain


class ByBuiltins(Indirect):
    def forward(self, x):
        import builtins

        return self.slow(x) * builtins.globals()["gain"]


class ByAFunctionsGlobals(Indirect):
    def forward(self, x):
        return self.slow(x) * getattr(called, "__globals__")["gain"]  # noqa: B009 - named in a string


class ByName(Indirect):
    def forward(self, x):
        return self.slow(x) * globals()["gain"]


class ByNameElsewhere(Indirect):
    def forward(self, x):
        return self.slow(x) * called("gain")


FOLLOWED = [Indirect, InAPartialCall, InAList, AsAMethod, ByAnAlias, ByAnAliasOfAFunctionsModule]
#: Ways on which dynamo does not follow, or not in each of its versions.
NOT_FOLLOWED = [AsAModule, ByAnImport, BySys, ByBuiltins, ByAFunctionsGlobals, ByName, ByNameElsewhere]


@pytest.mark.parametrize("kind", FOLLOWED + NOT_FOLLOWED)
def test_a_global_that_the_forward_reads_in_a_roundabout_way_is_noticed(kind, monkeypatch):
    settings = types.ModuleType("outer_settings")
    settings.gain, settings.times = 2.0, types.FunctionType(times.__code__, vars(settings), "times", (1.0,))
    settings.times.__module__ = settings.__name__
    monkeypatch.setitem(sys.modules, settings.__name__, settings)
    settings.__file__ = __file__
    way = DirectScale if kind in NOT_FOLLOWED else Captured
    model, x = kind().eval(), torch.randn(8, 16)
    optimized(model, x, plugins=[plugin(way)], budget=20)
    with torch.no_grad():
        before = model(x)
        monkeypatch.setitem(globals(), "gain", 3.0)
        settings.gain = 3.0
        changed = model(x)
        assert torch.equal(changed, kind.forward(model, x)) and not torch.equal(changed, before)
    assert kpt.report(model).calls["optimized"] == 1 and list(reasons(model).values()) == [1]
