"""Writes to weights of which a plan holds copies, whoever makes them, are noticed at the next call."""

from __future__ import annotations

import functools
import gc
import weakref

import numpy
import pytest
import torch
from torch.optim.optimizer import _global_optimizer_pre_hooks

import kpt
from fingerprints import fallbacks, fast_calls, optimized
from kpt.transaction import watch
from kpt.transaction.announcements import Announcements
from kpt.transaction.writes import Writes
from slow_models import DerivedScale, DirectScale, SlowScale, plugin


def copied() -> tuple[torch.nn.Module, torch.Tensor]:
    """A model without buffers, of whose weights a committed plan holds copies."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), SlowScale()).eval()
    x = torch.randn(8, 16)
    optimized(model, x, plugins=[plugin(DerivedScale)], budget=20)
    return model, x


def step(optimizer: torch.optim.Optimizer, model: torch.nn.Module, x: torch.Tensor) -> None:
    model.train()
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "Adam": torch.optim.Adam,
    "SGD": torch.optim.SGD,
    "Adagrad": torch.optim.Adagrad,
}


@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_an_optimizer_step_the_new_weights_count(name, how):
    """Fused optimizers write parameters in place without counting it."""
    model, x = copied()
    step(OPTIMIZERS[name](model.parameters(), lr=0.5, **how), model, x)
    with torch.no_grad():
        assert torch.equal(model(x), torch.nn.Sequential.forward(model, x))
    assert any("written in place" in reason for reason in fallbacks(model))
    kpt.refresh(model)
    with torch.no_grad():
        assert torch.allclose(model(x), torch.nn.Sequential.forward(model, x), atol=1e-5)
    assert fast_calls(model) >= 1


def test_an_optimizer_of_one_weight_and_one_of_another_model():
    model, x = copied()
    other = torch.nn.Linear(16, 16)
    step(torch.optim.SGD(other.parameters(), lr=0.5, fused=True), other, x)
    with torch.no_grad():
        model(x)
    assert fast_calls(model) == 1 and not fallbacks(model)
    step(torch.optim.SGD([model[1].bias], lr=0.5, fused=True), model, x)
    with torch.no_grad():
        assert torch.equal(model(x), torch.nn.Sequential.forward(model, x))


@pytest.mark.parametrize("fused", [True, False])
def test_a_frozen_part_that_the_optimizer_holds_serves_on(fused):
    """Nothing writes what has no gradient."""
    model, x = copied()
    model.requires_grad_(False)
    head = torch.nn.Linear(16, 4)
    kpt.refresh(model)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=0.1, fused=fused)
    for _ in range(3):
        with torch.no_grad():
            features = model(x)
        head(features).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert fast_calls(model) == 3 and not fallbacks(model)


def test_a_hook_of_the_optimizer_may_refresh_the_plan():
    model, x = copied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, fused=True)
    optimizer.register_step_post_hook(lambda *_: (model.eval(), kpt.refresh(model)))
    step(optimizer, model, x)
    with torch.no_grad():
        assert torch.allclose(model(x), torch.nn.Sequential.forward(model, x), atol=1e-5)
    assert fast_calls(model) == 1


def test_gradients_of_a_closure():
    model, x = copied()

    def closure():
        loss = model(x).square().mean()
        loss.backward()
        return loss

    torch.optim.SGD(model.parameters(), lr=0.5, fused=True).step(closure)
    with torch.no_grad():
        assert torch.equal(model(x), torch.nn.Sequential.forward(model, x))


class Uncounted(torch.optim.Optimizer):
    """As optimizers with kernels of their own, it writes past torch's counters."""

    fails = False

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.all = [parameter for group in self.param_groups for parameter in group["params"]]

    def step(self, closure=None):
        for parameter in self.all:
            parameter.data.add_(1.0)
            if self.fails:
                raise RuntimeError("out of memory")


class Failing(Uncounted):
    """It does not come to its end."""

    fails = True


class Odd(Uncounted):
    """Its groups are nothing that torch's optimizers know."""

    def __init__(self, parameters):
        super().__init__(parameters)
        self.param_groups = [None]


class Late(torch.optim.AdamW):
    """It gets its gradients from elsewhere, in its step."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        return super().step(closure)


@pytest.mark.parametrize("how", ["an optimizer of somebody else's", "a hook"])
def test_gradients_that_come_late(how):
    model, x = copied()
    optimizer = (Late if how != "a hook" else torch.optim.AdamW)(model.parameters(), lr=0.5, fused=True)
    if how == "a hook":

        def given(*_):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)

        optimizer.register_step_pre_hook(given)
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(model(x), torch.nn.Sequential.forward(model, x))
    assert any("written in place" in reason for reason in fallbacks(model))


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("kind", [Uncounted, Failing, Odd])
def test_somebody_elses_optimizer(kind, backward):
    model, x = copied()
    if backward:
        model(x).sum().backward()
    if kind is Failing:
        with pytest.raises(RuntimeError, match="out of memory"):
            kind(model.parameters()).step()
    else:
        kind(model.parameters()).step()
    with torch.no_grad():
        assert torch.equal(model(x), torch.nn.Sequential.forward(model, x))
    assert any("written in place" in reason for reason in fallbacks(model))


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["fused", "foreach"])
def test_a_compiled_step(how, dynamo):
    model, x = copied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, **{how: True})
    compiled = torch.compile(optimizer.step, backend="eager")
    graphs = []
    for _ in range(3):
        optimizer.zero_grad()
        model(x).sum().backward()
        compiled()
        with torch.no_grad():
            assert torch.equal(model(x), torch.nn.Sequential.forward(model, x))
        assert any("written in place" in reason for reason in fallbacks(model))
        kpt.refresh(model)
        graphs.append(dynamo["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[0], "what torch compiled serves on"


def hooked_and_converted(model: torch.nn.Module) -> None:
    model[0].register_forward_hook(lambda *_: None)
    model.double()


CHANGES = {"converted": torch.nn.Module.double, "restored": kpt.restore, "hooked": hooked_and_converted}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_memory_of_the_weights_is_free_once_they_have_other(change):
    model, _ = copied()
    held = numpy.zeros((16, 16), dtype=numpy.float32)
    model[0].weight.data = torch.from_numpy(held)
    kpt.refresh(model)
    gone = weakref.ref(held)
    del held
    change(model)
    model[0].weight.data = torch.zeros(16, 16)
    gc.collect()
    assert gone() is None


def test_a_plan_without_copies_serves_on_after_a_step():
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(16, 16), SlowScale()).eval(), torch.randn(8, 16)
    optimized(model, x, plugins=[plugin(DirectScale)], budget=20)
    step(torch.optim.AdamW(model.parameters(), lr=0.5, fused=True), model, x)
    with torch.no_grad():
        assert torch.allclose(model(x), torch.nn.Sequential.forward(model, x), atol=1e-5)
    assert fast_calls(model) >= 1


def test_nothing_hears_of_steps_once_no_plan_is_there(monkeypatch):
    monkeypatch.setattr(watch, "_announcements", Announcements())  # that of other tests may have listeners
    before = list(_global_optimizer_pre_hooks)
    model, _ = copied()
    assert len(_global_optimizer_pre_hooks) == len(before) + 1
    kpt.restore(model)
    assert list(_global_optimizer_pre_hooks) == before


class Wrapped(torch.Tensor):
    """A tensor of a class of its own."""


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "buffer": torch.randn(2, 2),
        "integers": torch.arange(4),
        "frozen": torch.nn.Parameter(torch.randn(3), requires_grad=False),
        "view": torch.randn(4, 4)[1:],
        "complex": torch.randn(2, dtype=torch.complex64),
        "empty": torch.empty(0, 3),
        "subclass": torch.randn(3).as_subclass(Wrapped),
        "sparse": torch.eye(3).to_sparse(),
    }


@pytest.mark.parametrize("inference", [False, True], ids=["", "in inference mode"])
@pytest.mark.parametrize("name", tensors())
def test_each_kind_of_tensor(name, inference):
    all_of_them = tensors()
    writes = Writes(all_of_them.values())
    assert not writes.happened()
    with torch.inference_mode(inference), torch.no_grad():
        assert not writes.happened()
        all_of_them[name].zero_()
        assert writes.happened()
    assert writes.happened()
    writes.settle()
    assert not writes.happened()


def test_a_write_to_a_view_or_to_what_it_is_a_view_of():
    base = torch.zeros(4, 4)
    row, writes = base[1], Writes([base])
    row.add_(1.0)
    assert writes.happened()
    writes = Writes([row])
    base.add_(1.0)
    assert writes.happened()


def test_after_new_data_writes_still_count():
    weight = torch.nn.Parameter(torch.randn(3))
    writes = Writes([weight])
    weight.data = torch.ones(3)
    with torch.no_grad():
        weight.mul_(2.0)
    assert writes.happened()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_construction_in_any_mode(mode):
    weight = torch.nn.Parameter(torch.randn(3))
    with mode():
        writes = Writes([weight])
    assert not writes.happened()
    with torch.no_grad():
        weight.mul_(2.0)
    assert writes.happened()


def test_hooks_on_what_autograd_saves_get_nothing_of_ours():
    weight, seen = torch.nn.Parameter(torch.randn(3)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        writes = Writes([weight])
        assert not writes.happened() and not seen
    with torch.no_grad():
        weight.mul_(2.0)
    assert writes.happened()


@pytest.mark.parametrize("leads", ["a hook", "an attribute"])
def test_a_parameter_that_leads_to_whoever_listens_is_collected_with_it(leads):
    weight = torch.nn.Parameter(torch.randn(3))
    writes = Writes([weight])
    if leads == "a hook":
        weight.register_hook(functools.partial(lambda held, gradient: None, writes))
    else:
        weight.listener = writes
    gone = weakref.ref(writes)
    del writes, weight
    gc.collect()
    assert gone() is None


def test_tensors_can_still_be_swapped():
    """torch refuses that for a tensor which anything else of C++ holds."""
    model, x = copied()
    torch.utils.swap_tensors(model[0].weight, torch.nn.Parameter(torch.zeros(16, 16)))
    kpt.refresh(model)
    with torch.no_grad():
        assert torch.allclose(model(x), torch.nn.Sequential.forward(model, x), atol=1e-5)
