"""Submodules, their forwards and lists of children that are replaced after the plan was made."""

from __future__ import annotations

import pytest
import torch

import kpt
from slow_models import SlowScale, net
from watched_models import Around, optimised, reasons


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def replace_forward(model):
    model.last.forward = lambda x: torch.zeros(len(x), 4)
    return lambda: delattr(model.last, "forward")


def replace_class(model):
    model.last.__class__ = Doubled
    return lambda: setattr(model.last, "__class__", torch.nn.Linear)


def replace_forward_beside_buffers(model):
    model.norm.forward = lambda x: x
    return lambda: delattr(model.norm, "forward")


@pytest.mark.parametrize("change", [replace_forward, replace_class, replace_forward_beside_buffers])
def test_a_submodule_that_computes_something_else_is_noticed_and_so_is_its_return(change):
    model, x = net(), torch.randn(8, 16)
    optimised(model, x)
    with torch.no_grad():
        before = model(x)
        put_back = change(model)
        changed = model(x)
        assert torch.equal(changed, type(model).forward(model, x)) and not torch.equal(changed, before)
        assert list(reasons(model).values()) == [1] and "was replaced" in next(iter(reasons(model)))
        put_back()
        assert torch.equal(model(x), before)
    assert kpt.report(model).calls["optimized"] == 2
    kpt.refresh(model)
    change(model)
    kpt.refresh(model)
    with torch.no_grad():
        assert torch.equal(model(x), changed)
    assert kpt.report(model).calls["optimized"] == 1


class Listed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([SlowScale(16), torch.nn.Linear(16, 16)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.layers.insert(1, torch.nn.Tanh()),
        lambda m: m.layers.pop(1),
        lambda m: m.layers.__delitem__(1),
        lambda m: m.layers.append(torch.nn.Tanh()),
        lambda m: setattr(m.layers, "_modules", {"0": torch.nn.Tanh(), "1": torch.nn.Tanh()}),
    ],
    ids=["inserted", "popped", "deleted", "appended", "all exchanged"],
)
def test_a_list_of_children_that_changes_is_noticed(change):
    model, x = Listed().eval(), torch.randn(8, 16)
    optimised(model, x)
    change(model)
    with torch.no_grad():
        assert torch.equal(model(x), Listed.forward(model, x))
    assert kpt.report(model).calls["optimized"] == 0


@pytest.mark.parametrize("look", [lambda m: m.train().eval(), kpt.report], ids=["mode", "report"])
def test_a_forward_set_past_setattr_is_noticed_after_a_look_at_everything(look):
    model, x = net(), torch.randn(8, 16)
    optimised(model, x)
    model.last.__dict__["forward"] = lambda x: torch.zeros(len(x), 4)
    look(model)
    with torch.no_grad():
        assert torch.equal(model(x), torch.zeros(8, 4))


def test_a_call_without_such_a_write_compares_nothing(monkeypatch):
    from kpt.transaction.structure import Structure

    model, x = net(), torch.randn(8, 16)
    optimised(model, x)
    model(x)
    monkeypatch.setattr(Structure, "changed", lambda self: pytest.fail("everything was compared"))
    for _ in range(3):
        model(x)
        model.first(x)
    assert kpt.report(model).calls["optimized"] == 4


def test_a_model_and_its_part_are_optimised_one_at_a_time():
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(Around(), SlowScale(16)).eval(), torch.randn(8, 16)
    with torch.no_grad():
        expected = model(x)
        optimised(model, x)
        optimised(model[0], x)
        assert torch.equal(model(x), expected)
        assert kpt.report(model[0]).calls["optimized"] == 1
        assert not kpt.report(model).optimized
        assert kpt.report(model).reason == "its part 0 was optimised by itself"
        optimised(model, x)
        assert not kpt.report(model[0]).optimized and "as a whole" in kpt.report(model[0]).reason
        assert torch.equal(model(x), expected)
        kpt.restore(model)
    kinds = {type(value) for module in model.modules() for value in vars(module).values()}
    assert not [kind for kind in kinds if kind.__module__.startswith("kpt")]
