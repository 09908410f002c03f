"""Copies, pickles and saved weights are those of an untouched model, and so is what looks through one."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle

import pytest
import torch

import fingerprints
import kpt
from fingerprints import fast_calls, optimized
from planned import PLANS, agrees, plans, ready
from slow_models import DerivedScale, Net, net, plugin


@plans
def test_a_deep_copy_runs_its_own_weights(plan):
    model, example = ready(plan)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = model(example)
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(twin(example), torch.zeros(32, 4))
        assert torch.equal(model(example), before)
    assert fast_calls(model) == 2
    with pytest.raises(ValueError, match="was not optimised"):
        kpt.report(twin)


def test_a_deep_copy_can_be_optimised_by_itself():
    model, example = ready("derived")
    twin = optimized(copy.deepcopy(model), example, plugins=[plugin(DerivedScale)])
    assert agrees(twin, example) and fast_calls(twin) == 1 and fast_calls(model) == 0
    twin.to(torch.float64).to(torch.float32)
    assert agrees(twin, example) and fast_calls(twin) == 1
    assert agrees(model, example) and fast_calls(model) == 1
    kpt.restore(twin)
    assert fingerprints.ours(twin) == []


@plans
def test_saved_weights_and_pickles_are_those_of_the_untouched_model(plan, tmp_path):
    untouched = net()
    model, example = ready(plan)
    assert list(model.state_dict()) == list(untouched.state_dict())
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    loaded = net()
    loaded.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert agrees(loaded, example)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    again = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert fingerprints.ours(again) == [] and b"kpt." not in buffer.getvalue()
    assert torch.equal(again(example), model(example))
    assert torch.equal(pickle.loads(pickle.dumps(model))(example), model(example))


def scaled(model, x, factor):
    return type(model).forward(model, x) * factor


def test_a_forward_that_hangs_on_the_instance_is_copied_along():
    """As in a model whose constructor sets ``self.forward = functools.partial(self._run, factor=2)``."""
    model = net()
    model.forward = functools.partial(scaled, model, factor=2.0)
    untouched = copy.deepcopy(model)
    example = torch.randn(32, 16)
    optimized(model, example, plugins=[plugin(DerivedScale)])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert fingerprints.ours(twin) == [] and twin.forward.args[0] is twin
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(0.5)
            for parameter, own in zip(untouched.parameters(), twin.parameters()):
                parameter.copy_(own)
            assert torch.equal(twin(example), untouched(example))
    assert fast_calls(model) == 0


def test_safetensors(tmp_path):
    from safetensors.torch import load_model, save_model

    model, example = ready("derived")
    save_model(model, tmp_path / "model.safetensors")
    loaded = net()
    load_model(loaded, tmp_path / "model.safetensors")
    assert torch.equal(loaded(example), model(example))
    with torch.no_grad():
        loaded.slow.weight.mul_(3.0)
    save_model(loaded, tmp_path / "other.safetensors")
    load_model(model, tmp_path / "other.safetensors")
    assert torch.equal(model(example), loaded(example))


def test_signature_state_and_identity_are_those_of_the_model():
    before = inspect.signature(net().forward)
    model, example = ready()
    assert inspect.signature(model.forward) == before
    assert model.forward.__name__ == "forward" and isinstance(model, Net)
    kpt.restore(model)
    assert inspect.signature(model.forward) == before
    assert "forward" not in vars(model) and fingerprints.ours(model) == []


class Slotted(Net):
    """A class with a state of its own making."""

    def __getstate__(self):
        return {**self.__dict__, "written": True}


@plans
@pytest.mark.parametrize("kind", [Net, Slotted])
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_have_the_attributes_of_an_untouched_model(plan, kind, way):
    torch.manual_seed(0)
    model, example = kind().eval(), torch.randn(32, 16)
    untouched = way(model)
    optimized(model, example, plugins=[plugin(PLANS[plan])])
    twin = way(model)
    for (path, mine), (_, plain) in zip(twin.named_modules(), untouched.named_modules(), strict=True):
        assert list(vars(mine)) == list(vars(plain)), path
        for name, value in vars(plain).items():
            assert type(vars(mine)[name]) is type(value), (path, name)
    assert fingerprints.ours(twin) == [] and hasattr(twin, "written") is (kind is Slotted)
    assert torch.equal(twin(example), model(example)) and fast_calls(model) == 1
    kpt.restore(model)
    assert fingerprints.ours(model) == [] and "__reduce_ex__" not in vars(model)
    assert [list(vars(m)) for m in way(model).modules()] == [list(vars(m)) for m in untouched.modules()]


class Copying(Net):
    def __deepcopy__(self, memo):
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin


def test_a_copy_by_the_classs_own_hand_is_inert():
    torch.manual_seed(0)
    model, example = Copying().eval(), torch.randn(32, 16)
    optimized(model, example, plugins=[plugin(PLANS["derived"])])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(twin(example), torch.zeros(32, 4))
    assert fast_calls(model) == 0
    again = pickle.loads(pickle.dumps(copy.deepcopy(twin)))
    assert torch.equal(again(example), torch.zeros(32, 4))


def test_what_looks_through_a_model_looks_through_an_optimised_one():
    model, example = ready("derived")
    with torch.no_grad():
        expected = model(example)
        found = [
            torch.compile(model, backend="eager", fullgraph=True)(example),
            torch.export.export(model, (example,)).module()(example),
            torch.jit.trace(model, (example,))(example),
            torch.fx.symbolic_trace(model)(example),
            torch.func.functional_call(model, dict(model.named_parameters()), (example,)),
        ]
    for output in found:
        torch.testing.assert_close(output, expected)
