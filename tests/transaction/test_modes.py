"""A committed plan through the life of a model: no stale weight, no wrong mode, no call that fails."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch

import fingerprints
import kpt
from fingerprints import fallbacks, fast_calls, optimized
from slow_models import DerivedScale, DirectScale, Net, net, plugin
from subtle_passes import Captured

PLANS = {"live": DirectScale, "derived": DerivedScale}
plans = pytest.mark.parametrize("plan", PLANS)


def ready(plan: str = "live", *, training: bool = False, **options: object) -> tuple[Net, torch.Tensor]:
    """An optimised model and the example that it was optimised for."""
    model, example = net(training), torch.randn(32, 16)
    optimized(model, example, plugins=[plugin(PLANS[plan])], **options)
    assert fast_calls(model) == 0
    return model, example


def eager(model: Net) -> Net:
    """A model without any plan that shares the weights."""
    twin = net(model.training)
    twin.load_state_dict(model.state_dict())
    return twin


def agrees(model: Net, example: torch.Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(model(example), eager(model)(example))


def trains(model: Net, example: torch.Tensor) -> None:
    """One step that moves every parameter well beyond rounding."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(example).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@plans
def test_evaluation_training_step_evaluation(plan):
    model, example = ready(plan)
    assert agrees(model, example) and fast_calls(model) == 1
    before = model(example).detach().clone()
    trains(model.train(), example)
    assert fallbacks(model)["the model is in training mode"] == 1
    model.eval()
    assert agrees(model, example)
    assert not torch.allclose(model(example), before)
    kpt.refresh(model)
    assert agrees(model, example) and fast_calls(model) == 1


def test_a_plan_that_reads_live_weights_stays_fast_after_a_training_step():
    model, example = ready("live")
    trains(model.train(), example)
    model.eval()
    assert agrees(model, example) and fast_calls(model) == 1


def test_a_plan_for_training_trains_as_eager_does():
    model, example = ready(training=True)
    twin = copy.deepcopy(eager(model))
    for _ in range(8):
        batch = torch.randn(32, 16)
        trains(model, batch)
        trains(twin, batch)
        for mine, theirs in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert fast_calls(model) == 8 and not fallbacks(model)
    model.eval()
    torch.testing.assert_close(model(example), twin.eval()(example), rtol=1e-5, atol=1e-6)
    assert fallbacks(model) == {"the model is in evaluation mode": 1}


def test_a_model_in_training_mode_without_gradients():
    """Monte-Carlo dropout, or a forgotten ``eval()``: inference, with running statistics that move."""
    model, twin, example = net(training=True), net(training=True), torch.randn(32, 16)
    with torch.no_grad():
        optimized(model, example, plugins=[plugin(DirectScale)])
        assert kpt.report(model).mode == "inference"
        torch.testing.assert_close(model(example), twin(example))
    assert fast_calls(model) == 1
    model(example).sum().backward()
    twin(example).sum().backward()
    assert fallbacks(model) == {"gradients are on in training mode": 1}
    assert torch.equal(model.norm.running_mean, twin.norm.running_mean)
    assert torch.equal(model.slow.weight.grad, twin.slow.weight.grad)
    model.eval()
    assert agrees(model, example) and fast_calls(model) == 1


@plans
@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(plan, assign):
    model, example = ready(plan)
    torch.manual_seed(9)
    other = Net().eval()
    model.load_state_dict(other.state_dict(), assign=assign)
    with torch.no_grad():
        assert torch.equal(model(example), other(example))
    kpt.refresh(model)
    with torch.no_grad():
        assert torch.equal(model(example), other(example))
    assert fast_calls(model) == 1


@plans
def test_weights_written_in_place(plan):
    model, example = ready(plan)
    with torch.no_grad():
        model.slow.weight.mul_(2.0)
        model.norm.running_mean.add_(1.0)
    assert agrees(model, example)
    if plan == "derived":
        assert "written in place" in next(iter(fallbacks(model)))


@plans
def test_a_weight_replaced_by_another(plan):
    model, example = ready(plan)
    model.slow.weight = torch.nn.Parameter(torch.ones(16))
    assert agrees(model, example)
    assert fast_calls(model) == 0 and fallbacks(model)


@plans
def test_a_write_without_a_trace_needs_refresh(plan):
    model, example = ready(plan)
    model.slow.weight.data.mul_(2.0)
    assert kpt.refresh(model) is model
    assert agrees(model, example) and fast_calls(model) == 1


@plans
def test_converted_to_another_dtype_and_back(plan):
    model, example = ready(plan)
    model.to(torch.float64)
    with torch.no_grad():
        assert torch.equal(model(example.double()), eager(model).double()(example.double()))
    model.to(torch.float32)
    assert agrees(model, example)
    assert fast_calls(model) == 0
    kpt.refresh(model)
    assert agrees(model, example) and fast_calls(model) == 1


@plans
def test_a_submodule_in_another_mode(plan):
    model, example = ready(plan)
    model.norm.train()
    twin = eager(model)
    twin.norm.train()
    assert torch.equal(model(example), twin(example))
    assert torch.equal(model.norm.running_mean, twin.norm.running_mean)
    model.norm.eval()
    assert agrees(model, example)


@plans
def test_an_attribute_of_a_submodule_edited(plan):
    model, example = ready(plan)
    model.norm.eps = 0.5
    twin = eager(model)
    twin.norm.eps = 0.5
    assert torch.equal(model(example), twin(example))
    model.norm.eps = 1e-5
    assert agrees(model, example)


def test_a_submodule_replaced():
    model, example = ready()
    model.last = torch.nn.Linear(16, 7)
    assert model(example).shape == (32, 7)


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


class Tied(torch.nn.Module):
    """Two layers that share one weight and one module that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        inner = net()
        self.first, self.again = inner.slow, inner.slow
        self.up, self.down = torch.nn.Linear(16, 16, bias=False), torch.nn.Linear(16, 16, bias=False)
        self.down.weight = self.up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.down(self.first(self.up(x))))


@plans
def test_shared_modules_and_tied_weights(plan):
    torch.manual_seed(0)
    model, example = Tied().eval(), torch.randn(32, 16)
    optimized(model, example, plugins=[plugin(PLANS[plan])])
    assert model.down.weight is model.up.weight and model.again is model.first
    twin = Tied().eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(model(example), twin(example)) and fast_calls(model) == 1
    with torch.no_grad():
        model.up.weight.mul_(2.0)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(model(example), twin(example))


@plans
def test_inference_mode_and_then_training(plan):
    model, example = ready(plan)
    with torch.inference_mode():
        assert torch.equal(model(example), eager(model)(example))
    assert fast_calls(model) == 1
    trains(model.train(), example)
    model.eval()
    with torch.inference_mode():
        assert torch.equal(model(example), eager(model)(example))


@plans
def test_gradients_through_a_model_optimised_for_inference(plan):
    model, example = ready(plan)
    twin = eager(model)
    mine, theirs = example.clone().requires_grad_(), example.clone().requires_grad_()
    model(mine).square().sum().backward()
    twin(theirs).square().sum().backward()
    assert fast_calls(model) == 1
    torch.testing.assert_close(mine.grad, theirs.grad)
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize("made_inside", [True, False], ids=["inference tensors", "ordinary tensors"])
@pytest.mark.parametrize("optimised_inside", [True, False], ids=["optimised inside", "optimised outside"])
def test_compiled_code_serves_calls_in_inference_mode(optimised_inside, made_inside):
    model = net()
    twin = copy.deepcopy(model)
    with torch.inference_mode(optimised_inside):
        optimized(model, torch.randn(32, 16), plugins=[plugin(Captured)])
    with torch.inference_mode(made_inside):
        examples = [torch.randn(32, 16) for _ in range(3)]
    with torch.inference_mode():
        for example in examples:
            found, expected = model(example), twin(example)
            torch.testing.assert_close(found, expected)
            assert found.is_inference()
    assert fast_calls(model) == 3 and not fallbacks(model)
    with torch.no_grad():
        torch.testing.assert_close(model(examples[0]), twin(examples[0]))
    assert fast_calls(model) == 4 and not fallbacks(model)


def test_compiled_code_serves_inputs_that_require_a_gradient():
    model, example = net(), torch.randn(32, 16)
    twin = copy.deepcopy(model.eval())
    optimized(model, example, plugins=[plugin(Captured)])
    mine, theirs = example.clone().requires_grad_(), example.clone().requires_grad_()
    model(mine).square().sum().backward()
    twin(theirs).square().sum().backward()
    assert fast_calls(model) == 1 and not fallbacks(model)
    torch.testing.assert_close(mine.grad, theirs.grad)


class PartlyDetached(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        result = self.net(x)
        return {"result": result, "scores": result.detach() * 2.0, "scaled": x * 2.0}


class WithoutGradients(PartlyDetached):
    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return super().forward(x)


@pytest.mark.parametrize("cls", [PartlyDetached, WithoutGradients])
@pytest.mark.parametrize("input_requires", [False, True])
def test_outputs_carry_gradients_where_eagers_do(cls, input_requires):
    torch.manual_seed(0)
    model, x = cls().eval(), torch.randn(32, 16)
    twin = copy.deepcopy(model)
    optimized(model, x, plugins=[plugin(DirectScale)])
    given = [x.clone().requires_grad_(input_requires) for _ in range(2)]
    mine, theirs = model(given[0]), twin(given[1])
    assert fast_calls(model) == 1
    assert {k: t.requires_grad for k, t in mine.items()} == {k: t.requires_grad for k, t in theirs.items()}
    if cls is PartlyDetached:
        mine["result"].sum().backward()
        theirs["result"].sum().backward()
        assert all(torch.allclose(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters()))


class Samples(torch.nn.Module):
    """Adds noise of the size that its net says, as a variational autoencoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.net(x)
        return y + torch.randn_like(y) * y.tanh()


class Accumulates(Samples):
    """Scales by a running mean, which every call moves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.net(x)
        self.mean.mul_(0.9).add_(0.1 * y.mean(0).detach())
        return y * (self.mean + 1.0)


class WritesToItsInput(Samples):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x.add_(1.0))


@pytest.mark.parametrize(
    ("cls", "what"),
    [
        (Samples, "draws random numbers"),
        (Accumulates, "writes to the buffer mean"),
        (WritesToItsInput, "writes to its inputs"),
    ],
)
def test_a_call_that_cannot_be_repeated_is_eagers_where_gradients_are_on(cls, what):
    torch.manual_seed(0)
    model, x = cls().eval(), torch.randn(32, 16)
    twin = copy.deepcopy(model)
    optimized(model, x, plugins=[plugin(DirectScale)])
    for each in (model, twin):
        torch.manual_seed(3)
        each(x.clone()).square().sum().backward()
    after = torch.get_rng_state()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)
    for name, buffer in twin.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer)
    assert fallbacks(model) == {f"a gradient may be asked for, and the forward {what}": 1}
    results = []
    for each in (model, twin):
        torch.manual_seed(3)
        with torch.no_grad():
            results.append(each(x.clone()))
    torch.testing.assert_close(*results)
    assert torch.equal(torch.get_rng_state(), after) and fast_calls(model) == 1


class AsksForGradients(Samples):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) * (2 if x.requires_grad else 1)


class OneOrTwo(Samples):
    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.net(q) * (2 if q is k else 1) + k, q


@pytest.mark.parametrize("chosen", [DirectScale, Captured])
@pytest.mark.parametrize("grad", [False, True])
def test_a_forward_that_asks_whether_its_input_requires_a_gradient(chosen, grad):
    torch.manual_seed(0)
    model, x = AsksForGradients().eval(), torch.randn(32, 16)
    twin = copy.deepcopy(model)
    optimized(model, x, plugins=[plugin(chosen)])
    for requires in (False, True):
        given = [x.clone().requires_grad_(requires) for _ in range(2)]
        with torch.set_grad_enabled(grad):
            mine, true = model(given[0]), twin(given[1])
        torch.testing.assert_close(mine, true)
        if grad and requires:
            mine.sum().backward(), true.sum().backward()
            torch.testing.assert_close(given[0].grad, given[1].grad)


@pytest.mark.parametrize("chosen", [DirectScale, Captured])
def test_one_tensor_that_requires_a_gradient_and_is_passed_twice_stays_one(chosen):
    torch.manual_seed(0)
    model, x = OneOrTwo().eval(), torch.randn(32, 16)
    model.net.last = torch.nn.Linear(16, 16)
    twin = copy.deepcopy(model)
    optimized(model, (x, x), plugins=[plugin(chosen)])
    given = [torch.randn(32, 16, requires_grad=True)]
    given.append(given[0].detach().clone().requires_grad_())
    for each, tensor in zip((model, twin), given):
        result, same = each(tensor, tensor)
        (result.sum() + same.sum()).backward()
    torch.testing.assert_close(model(given[0], given[0])[0], twin(given[0], given[0])[0])
    torch.testing.assert_close(given[0].grad, given[1].grad)
    assert fast_calls(model) == 2 and not fallbacks(model)


def test_frozen_parameters_get_no_gradient():
    model, example = ready()
    model.requires_grad_(False)
    model.last.requires_grad_(True)
    model(example).sum().backward()
    assert model.slow.weight.grad is None and model.last.weight.grad is not None


def test_parameters_that_were_frozen_when_it_was_optimised_get_their_gradients():
    model, example = net(False).requires_grad_(False), torch.randn(32, 16)
    optimized(model, example, plugins=[plugin(DirectScale)])
    model.requires_grad_(True)
    model(example).sum().backward()
    plain = eager(model)
    plain(example).sum().backward()
    for mine, true in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, true.grad)


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
