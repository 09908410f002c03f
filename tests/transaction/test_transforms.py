"""What swaps a model's tensors or transforms its calls meets an optimised model as it meets the original."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

import kpt
from slow_models import DerivedScale, DirectScale, Net, SlowScale, net, plugin

PASSES = pytest.mark.parametrize("offered", [DirectScale, DerivedScale], ids=["live", "derived"])


def ready(offered: type, model: torch.nn.Module | None = None, example: Any = None) -> tuple[Any, Any]:
    """An optimised model and its untouched twin."""
    model = net() if model is None else model
    twin = copy.deepcopy(model)
    example = torch.randn(32, 16) if example is None else example
    kpt.optimize(model, example, plugins=[plugin(offered)], budget=20.0, cache=False)
    assert kpt.report(model).optimized, kpt.report(model).reason
    return model, twin


def doubled(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {n: t.detach() * 2 for n, t in tensors if t.is_floating_point()}


@PASSES
def test_functional_call_uses_the_tensors_that_it_is_given(offered):
    model, twin = ready(offered)
    example = torch.randn(32, 16)
    given = doubled(model)
    with torch.no_grad():
        found = torch.func.functional_call(model, given, (example,))
        torch.testing.assert_close(found, torch.func.functional_call(twin, given, (example,)))
        assert kpt.report(model).calls["optimized"] == 0
        torch.testing.assert_close(model(example), twin(example))  # they are the model's own again
    assert kpt.report(model).calls["optimized"] == 1


@PASSES
@pytest.mark.parametrize("store", ["_parameters", "_buffers"])
def test_a_tensor_exchanged_past_the_modules_interface(offered, store):
    model, twin = ready(offered)
    example = torch.randn(32, 16)
    path, name = ("slow", "weight") if store == "_parameters" else ("norm", "running_mean")
    for each in (model, twin):
        held = getattr(each.get_submodule(path), store)
        held[name] = torch.full_like(held[name], 3.0)
    with torch.no_grad():
        torch.testing.assert_close(model(example), twin(example))
    assert any("replaced" in reason for reason in kpt.report(model).calls["reasons"])
    kpt.restore(model)
    assert all(type(m._parameters) is dict and type(m._buffers) is dict for m in model.modules())
    assert float(getattr(model.get_submodule(path), name).detach()[0]) == 3.0


TRANSFORMS: dict[str, Callable[[torch.nn.Module, torch.Tensor], Any]] = {
    "vmap": lambda m, x: torch.vmap(m)(torch.stack([x, x + 1])),
    "grad": lambda m, x: torch.func.grad(lambda z: m(z).square().sum())(x),
    "gradients of given parameters": lambda m, x: torch.func.grad(
        lambda p: torch.func.functional_call(m, p, (x,)).square().sum()
    )({n: p.detach() for n, p in m.named_parameters()}),
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (torch.ones_like(x),)),
    "jacrev": lambda m, x: torch.func.jacrev(m)(x[:2]),
    "dual numbers": lambda m, x: dual(m, x),
}


def dual(model: torch.nn.Module, x: torch.Tensor) -> Any:
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x))))
        assert found.tangent is not None
        return found.primal.detach().clone(), found.tangent.detach().clone()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_see_the_original(name):
    model, twin = ready(DirectScale)
    example = torch.randn(32, 16)
    torch.testing.assert_close(TRANSFORMS[name](model, example), TRANSFORMS[name](twin, example))


def test_a_model_that_waits_is_not_observed_inside_a_transform():
    model = kpt.optimize(net(), plugins=[plugin(DirectScale)], budget=20.0, cache=False)
    example = torch.randn(32, 16)
    torch.func.grad(lambda z: model(z).sum())(example)
    assert kpt.report(model).reason == "waiting for the first call"


class Many(torch.nn.Module):
    """Takes tensors in a container."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = SlowScale(16)

    def forward(self, xs: Any) -> torch.Tensor:
        return torch.cat([self.slow(x) for x in (xs.values() if isinstance(xs, dict) else xs)])


@pytest.mark.parametrize("wrap", [list, tuple, lambda xs: dict(zip("ab", xs))], ids=["list", "tuple", "dict"])
def test_inputs_inside_containers_get_their_gradients(wrap):
    model, twin = ready(DirectScale, Many().eval(), (wrap([torch.randn(3, 16), torch.randn(5, 16)]),))
    inputs = [torch.randn(3, 16, requires_grad=True), torch.randn(5, 16, requires_grad=True)]
    found, expected = (torch.autograd.grad(m(wrap(inputs)).square().sum(), inputs) for m in (model, twin))
    torch.testing.assert_close(found, expected)
    assert kpt.report(model).calls["optimized"] == 1


class Dense(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slow = SlowScale(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.slow(x.to_padded_tensor(0.0) if x.is_nested else x.to_dense())


@pytest.mark.parametrize("layout", ["coo", "csr", "nested"])
@pytest.mark.filterwarnings("ignore:.*prototype.*", "ignore:.*beta.*")
def test_layouts_without_contiguity_run_the_original(layout):
    model, twin = ready(DirectScale, Dense().eval())
    dense = torch.randn(32, 16).relu()
    given = {
        "coo": dense.to_sparse,
        "csr": dense.to_sparse_csr,
        "nested": lambda: torch.nested.nested_tensor([dense[:3], dense[:5]]),
    }[layout]()
    with torch.no_grad():
        torch.testing.assert_close(model(given), twin(given))
    assert kpt.report(model).calls["fallback"] == 1


class Counted(Net):
    def forward(self, x: torch.Tensor, n: Any) -> Any:
        return super().forward(x), torch.ones(3, dtype=torch.long) * n


def test_constants_that_are_equal_and_of_another_type_are_others():
    model, _ = ready(DirectScale, Counted().eval(), (torch.randn(32, 16), 1))
    with torch.no_grad():
        for constant in (1.0, True, 1):
            model(torch.randn(32, 16), constant)
    assert kpt.report(model).calls["fallback"] == 2
    assert kpt.report(model).calls["optimized"] == 1


OUTPUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "complex": torch.fft.rfft,
    "one complex number": lambda y: torch.fft.rfft(y).sum(),
    "one byte": lambda y: y.to(torch.float8_e4m3fn),
    "nested": lambda y: torch.nested.as_nested_tensor([y, y[:1]]),
}


class Returning(Net):
    def forward(self, x: torch.Tensor) -> Any:
        y = super().forward(x)
        return y, OUTPUTS[self.kind](y)


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.filterwarnings("ignore:.*prototype.*")
def test_training_with_outputs_that_do_not_add_up(kind):
    torch.manual_seed(0)
    model = Returning().train()
    model.kind = kind
    kpt.optimize(model, torch.randn(32, 16), plugins=[plugin(DirectScale)], budget=20.0, cache=False)
    receipt = kpt.report(model)
    assert receipt.optimized or kind == "nested" and "cannot be compared" in receipt.reason, receipt.reason


class Overwriting(Net):
    """Runs, and has no gradient: its input is overwritten after it was saved for the backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return x.add_(y.sum())


def test_a_model_in_training_mode_whose_gradient_cannot_be_taken_comes_back_with_the_reason():
    model = Overwriting().train()
    kpt.optimize(model, torch.randn(32, 16), plugins=[plugin(DirectScale)], budget=20.0, cache=False)
    assert not kpt.report(model).optimized
    assert "no gradient can be taken" in kpt.report(model).reason
    assert "forward" not in vars(model)


def test_a_pre_hook_that_changes_the_call_is_named():
    model = net()
    model.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    example = torch.randint(0, 5, (32, 16))
    expected = model(example)
    kpt.optimize(model, example, plugins=[plugin(DirectScale)], budget=20.0, cache=False)
    assert "forward pre-hook" in kpt.report(model).reason
    assert torch.equal(model(example), expected)
    kpt.optimize(model, plugins=[plugin(DirectScale)], budget=20.0, cache=False)
    assert torch.equal(model(example), expected)
    assert kpt.report(model).optimized
    torch.testing.assert_close(model(example), expected)
    assert kpt.report(model).calls["optimized"] == 1


class Subclass(torch.Tensor):
    pass


INPUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sparse_coo": lambda x: x.to_sparse(),
    "sparse_csr": lambda x: x.to_sparse_csr(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x, x[:3]]),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "Subclass": lambda x: x.as_subclass(Subclass),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.filterwarnings("ignore:.*prototype.*", "ignore:.*beta.*", "ignore:.*quantized.*")
def test_examples_of_other_kinds_of_tensors_come_back_with_the_reason(kind):
    model, example = Dense().eval(), INPUTS[kind](torch.randn(32, 16))
    assert kpt.optimize(model, example, plugins=[plugin(DirectScale)], budget=20.0, cache=False) is model
    assert f"is a {kind} tensor" in kpt.report(model).reason
    assert "forward" not in vars(model)
    assert kpt.refresh(model) is model


class ReturnsViews(torch.nn.Module):
    """Outputs in other shapes than they were computed in: of memory that nobody else sees."""

    def __init__(self, several: bool) -> None:
        super().__init__()
        self.slow = SlowScale(16)
        self.several = several

    def forward(self, x):
        y = self.slow(x)
        return (y.view(4, 2, 16), y.sum()) if self.several else y.view(4, 2, 16)


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize(
    "write", [lambda y: y.mul_(2.0), lambda y: y[0].zero_(), lambda y: y.__setitem__((..., 0), 1.0)]
)
def test_an_output_that_is_a_view_may_be_written_to(several, write):
    example = torch.randn(8, 16)
    models = ready(DirectScale, ReturnsViews(several).eval(), example)
    for model in models:
        output = model(example)[0] if several else model(example)
        write(output)
        output.square().sum().backward()
    assert kpt.report(models[0]).calls["optimized"] == 1
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
