"""Parts of a model that TorchScript runs: they are left as they are, and what is around them is optimised."""

from __future__ import annotations

import copy

import pytest
import torch

import fingerprints
import kpt
from few_variants import Frozen
from fingerprints import fast_calls, optimized
from kpt.transaction.recipe import structure_hash
from slow_models import DirectScale, SlowScale, plugin


class Beside(torch.nn.Module):
    """A part that TorchScript runs between two that it does not."""

    def __init__(self, how: str) -> None:
        super().__init__()
        inner = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.BatchNorm1d(16)).eval()
        self.before = torch.nn.Sequential(torch.nn.Linear(16, 16), SlowScale(16))
        self.inner = (
            torch.jit.script(inner) if how == "scripted" else torch.jit.trace(inner, torch.ones(2, 16))
        )
        self.after = SlowScale(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.inner(self.before(x)))


@pytest.mark.parametrize(("step", "phase"), [(DirectScale, "layout"), (Frozen, "compile")])
@pytest.mark.parametrize("how", ["scripted", "traced"])
@pytest.mark.filterwarnings("ignore:.*deprecated.*")
def test_what_is_beside_a_scripted_part_is_optimised(how: str, step: type, phase: str) -> None:
    torch.manual_seed(0)
    model, x = Beside(how).eval(), torch.randn(8, 16)
    before = fingerprints.of_model(model)
    with torch.no_grad():
        expected = model(x)
        optimized(model, x, plugins=[plugin(step, phase=phase)], budget=60.0)
        torch.testing.assert_close(model(x), expected)
        assert fast_calls(model) == 1
        assert any("scripted or traced: inner" in note for note in kpt.report(model).notes)
        for weight in model.inner.parameters():
            weight.mul_(2.0)
        twin = copy.deepcopy(kpt.restore(model))
        optimized(model, x, plugins=[plugin(step, phase=phase)], budget=60.0)
        torch.testing.assert_close(model(x), twin(x))
        for weight in model.inner.parameters():
            weight.div_(2.0)
        torch.testing.assert_close(model(x), expected)  # by whichever way
        kpt.restore(model)
        assert torch.equal(model(x), expected)
    assert fingerprints.differences(before, fingerprints.of_model(model)) == []


def test_other_scripted_parts_are_another_model_to_the_cache() -> None:
    first, second = (
        torch.nn.Sequential(torch.jit.script(each)) for each in (torch.nn.ReLU(), torch.nn.Tanh())
    )
    assert structure_hash(first) != structure_hash(second)
    again = torch.nn.Sequential(torch.jit.script(torch.nn.ReLU()))
    assert structure_hash(first) == structure_hash(again)
