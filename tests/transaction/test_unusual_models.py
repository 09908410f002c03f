"""Modules that are made or shown in unusual ways come back right: optimised, or untouched with the reason."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import fingerprints
import kpt
from fingerprints import fast_calls, optimized
from kpt.ops.clone import clone as clone_for_proof
from kpt.transaction import workspace
from slow_models import DerivedScale, DirectScale, Net, SlowScale, plugin


class Slots(torch.nn.Module):
    """Keeps an attribute outside of its dictionary."""

    __slots__ = ("factor", "unset")

    def __init__(self) -> None:
        super().__init__()
        self.factor = 2.0
        self.slow = SlowScale(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.slow(x) * self.factor


class OwnNew(Slots):
    """Can't be made without its argument."""

    def __new__(cls, factor: float) -> OwnNew:
        return super().__new__(cls)

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor


class Static(torch.nn.Module):
    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x * 2


class OfClass(torch.nn.Module):
    @classmethod
    def forward(cls, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def layers() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(16, 16), SlowScale(16))


MODELS = {
    "slots": Slots,
    "own __new__": lambda: OwnNew(3.0),
    "static method": Static,
    "class method": OfClass,
    "torch.fx": lambda: torch.fx.symbolic_trace(layers()),
    "torch.fx inside": lambda: torch.nn.Sequential(torch.fx.symbolic_trace(layers()), SlowScale(16)),
    "data parallel": lambda: torch.nn.DataParallel(layers()),
    "scripted": lambda: torch.jit.script(layers()),
    "traced": lambda: torch.jit.trace(layers(), torch.randn(3, 16)),
    "lazy": lambda: torch.nn.Sequential(torch.nn.LazyLinear(16), SlowScale(16)),
}


@pytest.mark.parametrize("deferred", [False, True], ids=["at once", "deferred"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:.*deprecated.*")
def test_outputs_stay_and_nothing_fails(name: str, deferred: bool, recwarn: Any) -> None:
    model: Any = MODELS[name]().eval()
    example = torch.randn(8, 16)
    with torch.no_grad():
        expected = None if name == "lazy" else model(example)
        kpt.optimize(
            model, None if deferred else example, plugins=[plugin(DirectScale)], budget=20.0, cache=False
        )
        first = model(example)
        receipt = kpt.report(model)
        torch.testing.assert_close(first, first if expected is None else expected)
        torch.testing.assert_close(model(example), first)
        kpt.restore(kpt.refresh(model))
        torch.testing.assert_close(model(example), first)
    assert receipt.optimized or receipt.reason
    assert not [w for w in recwarn if "was not optimised" in str(w.message)]
    if name in ("slots", "own __new__", "torch.fx inside", "data parallel"):
        assert receipt.optimized, receipt.reason


@pytest.mark.parametrize("copied", [workspace.clone, clone_for_proof])
@pytest.mark.parametrize("name", ["slots", "own __new__", "torch.fx"])
def test_copies_are_of_the_same_class_and_compute_the_same(copied: Any, name: str) -> None:
    model: Any = MODELS[name]().eval()
    twin = copied(model)
    assert type(twin) is type(model)
    example = torch.randn(8, 16)
    assert torch.equal(twin(example), model(example))


def test_weights_that_are_not_there_yet_are_a_reason() -> None:
    model = layers().to("meta").eval()
    assert kpt.optimize(model, torch.randn(3, 16), plugins=[plugin(DirectScale)], cache=False) is model
    assert "meta device" in kpt.report(model).reason
    lazy = MODELS["lazy"]().eval()
    kpt.optimize(lazy, torch.randn(3, 16), plugins=[plugin(DirectScale)], cache=False)
    assert "gets its shape from the first call" in kpt.report(lazy).reason
    assert isinstance(lazy[0].weight, torch.nn.UninitializedParameter)


def test_a_deferred_run_that_failed_is_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    from kpt.transaction import api

    def fails(*args: Any) -> None:
        raise LookupError("nothing works")

    monkeypatch.setattr(api, "execute", fails)
    model = kpt.optimize(Net().eval(), plugins=[plugin(DirectScale)], cache=False)
    with pytest.warns(UserWarning, match="nothing works"):
        model(torch.randn(8, 16))
    assert "LookupError: nothing works" in kpt.report(model).reason


class EqualToAll(Net):
    """Says of each two of its kind that they are equal, as classes compared by their settings do."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EqualToAll)

    def __hash__(self) -> int:
        return 7


def test_models_that_call_themselves_equal_have_reports_and_watches_of_their_own() -> None:
    x = torch.randn(8, 16)
    first, second, never = EqualToAll().eval(), EqualToAll().eval(), EqualToAll().eval()
    optimized(first, x, plugins=[plugin(DirectScale)])
    kpt.optimize(second, x, plugins=[plugin()], cache=False)
    assert kpt.report(first).optimized and not kpt.report(second).optimized
    with pytest.raises(ValueError, match="was not optimised"):
        kpt.report(never)
    optimized(second, x, plugins=[plugin(DirectScale)])
    first.double()
    with torch.no_grad():
        first(x.double())
        second(x)
    assert fast_calls(first) == 0 and fast_calls(second) == 1
    assert any("moved or converted" in reason for reason in fingerprints.fallbacks(first))


class Trainable(Net):
    """Tells optimizers of its last layer only, by `parameters`."""

    def parameters(self, recurse: bool = True) -> Any:
        return self.last.parameters(recurse)


class NamesNoBuffers(Net):
    def named_buffers(self, *args: Any, **options: Any) -> Any:
        return iter(())


class ShowsNoParts(Net):
    def named_modules(self, *args: Any, **options: Any) -> Any:
        yield "", self


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (Trainable, r"Trainable has parameters\(\) or named_parameters\(\).*first.weight"),
        (NamesNoBuffers, r"named_buffers\(\).*norm.running_mean"),
        (ShowsNoParts, r"named_modules\(\) of its own, which leaves out first"),
    ],
)
def test_a_model_that_hides_parts_of_itself_comes_back_with_the_reason(cls: type, said: str) -> None:
    """Copies of a weight that nobody tells of would go stale unnoticed."""
    model, x = cls().train(False), torch.randn(8, 16)
    for part in (model.first, model.slow, model.norm, model.dropout, model.last):
        part.training = False
    expected = model(x)
    kpt.optimize(model, x, plugins=[plugin(DerivedScale)], budget=20.0, cache=False)
    receipt = kpt.report(model)
    assert not receipt.optimized and re.search(said, receipt.reason), receipt.reason
    assert torch.equal(model(x), expected)
