"""Models whose calls do not simply run their forward: compiled in place, a call or a forward of their own."""

from __future__ import annotations

from typing import Any

import torch

import fingerprints
import kpt
from fingerprints import fast_calls, optimized
from kpt.compiling import CompiledForward
from kpt.transaction import workspace
from slow_models import DirectScale, Net, SlowScale, plugin


class TakesAnObject(torch.nn.Module):
    """Takes what the guard has no rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = SlowScale(16)

    def forward(self, box: Any) -> torch.Tensor:
        return self.slow(box.x)


class Box:
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


def test_an_argument_that_no_call_is_served_with_is_named() -> None:
    model = TakesAnObject().eval()
    kpt.optimize(model, (Box(torch.randn(8, 16)),), plugins=[plugin(DirectScale)], budget=20.0, cache=False)
    assert not kpt.report(model).optimized
    receipt = kpt.report(model)
    assert "'box' has an unsupported type Box" in receipt.reason
    assert not receipt.searched and not receipt.rejected  # known before anything is tried


def test_a_submodule_that_was_compiled_in_place_is_named() -> None:
    model, x = Net().eval(), torch.randn(32, 16)
    model.slow.compile(backend="eager")
    expected = model(x)
    kpt.optimize(model, x, plugins=[plugin(DirectScale)], budget=20.0, cache=False)
    receipt = kpt.report(model)
    assert not receipt.optimized and "compile() was called on slow" in receipt.reason
    assert torch.equal(model(x), expected)
    model.slow._compiled_call_impl = None
    assert kpt.report(optimized(model, x, plugins=[plugin(DirectScale)])).optimized


class AnswersItself(Net):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class AnswersThroughForward(Net):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(x)


def test_a_class_that_answers_calls_without_its_forward_is_named() -> None:
    x = torch.randn(32, 16)
    model = kpt.optimize(AnswersItself().eval(), x, plugins=[plugin(DirectScale)], budget=20.0, cache=False)
    receipt = kpt.report(model)
    assert not receipt.optimized and "AnswersItself has a __call__ of its own" in receipt.reason
    assert not receipt.searched
    other = optimized(AnswersThroughForward().eval(), x, plugins=[plugin(DirectScale)])
    with torch.no_grad():
        other(x)
    assert fast_calls(other) == 1


def test_a_copy_of_a_compiled_model_runs_the_copys_modules_when_it_is_traced():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False)).eval()
    example = torch.randn(2, 4)
    copied = workspace.clone(workspace.clone(torch.compile(model, backend="eager")))
    copied.get_submodule("_orig_mod.0").weight = torch.nn.Parameter(torch.zeros(4, 4))
    with torch.no_grad():
        assert not copied.forward(example).any()
        # What the compiler would compile: the copy, and not the model that it was made of.
        assert not CompiledForward(copied.forward, backend="eager")(example).any()
        assert model(example).any()


def test_a_model_that_is_called_without_a_forward_comes_back_with_the_reason():
    class OnlyCall(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slow = SlowScale(16)

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return self.slow(x)

    for examples in ((torch.randn(3, 16),), ()):
        model = OnlyCall().eval()
        kpt.optimize(model, *examples, plugins=[plugin(DirectScale)], cache=False)
        assert model(torch.randn(3, 16)).shape == (3, 16)
        assert "OnlyCall has no forward" in kpt.report(model).reason
        assert fingerprints.ours(model) == []


class ForwardIsAProperty(Net):
    @property
    def forward(self) -> Any:
        return lambda x: Net.forward(self, x)


def test_a_forward_that_no_other_gets_past_is_a_reason() -> None:
    model, x = ForwardIsAProperty().eval(), torch.randn(8, 16)
    kpt.optimize(model, x, plugins=[plugin(DirectScale)], budget=20.0, cache=False)
    assert "is a property" in kpt.report(model).reason and not kpt.report(model).searched
