"""glu and gated_mlp against fp64: values, gradients, layouts, sizes, memory, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_suite import TritonSuite, gradcheck

import kpt_plugin_triton.plugin as plugin
from kpt.ops import reference
from kpt_plugin_triton import gated_mlp as module
from kpt_plugin_triton.activations import ACTIVATIONS
from kpt_plugin_triton.checks import KernelInputError
from kpt_plugin_triton.gated_mlp import gated_mlp
from kpt_plugin_triton.glu import glu
from kpt_plugin_triton.references.glu import glu as plain

KERNELS = {spec.op: spec for spec in plugin.kpt_kernels()}
DEVICE = TritonSuite.device


def _randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).to(DEVICE)


class TestGlu(TritonSuite):
    kernel = KERNELS["glu"]

    def arguments(self):
        return {"gate": _randn(2, 6, 32), "up": _randn(2, 6, 32, seed=1), "activation": "silu"}

    def reference(self):
        return plain


class TestGeglu(TestGlu):
    def arguments(self):
        return {**super().arguments(), "activation": "gelu"}


class TestGatedMlp(TritonSuite):
    kernel = KERNELS["gated_mlp"]


def _mlp(hidden=12, inner=20, biased=False, dtype=torch.float32):
    weights = {
        "gate_weight": _randn(inner, hidden, dtype=dtype, seed=2) / 4,
        "up_weight": _randn(inner, hidden, dtype=dtype, seed=3) / 4,
        "down_weight": _randn(hidden, inner, dtype=dtype, seed=4) / 4,
    }
    if biased:
        for seed, (name, size) in enumerate((("gate", inner), ("up", inner), ("down", hidden))):
            weights[f"{name}_bias"] = _randn(size, dtype=dtype, seed=5 + seed)
    return weights


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_their_whole_range(activation: str) -> None:
    """Values and slopes where they saturate, where they turn and at zero, and a NaN stays one."""
    gate = torch.cat((torch.linspace(-30, 30, 601), torch.tensor([0.0, -1e4, 1e4, 1e-20]))).to(DEVICE)
    up = torch.ones_like(gate)
    gate.requires_grad_()
    wide = gate.detach().double().requires_grad_()
    mine, true = glu(gate, up, activation), plain(wide, up.double(), activation)
    torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-6)
    (slope,) = torch.autograd.grad(mine.sum(), gate)
    (expected,) = torch.autograd.grad(true.sum(), wide)
    torch.testing.assert_close(slope.double(), expected, rtol=1e-5, atol=1e-6)
    assert glu(torch.full_like(up, float("nan")), up, activation).isnan().all()


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    activation=st.sampled_from(ACTIVATIONS),
    fused=st.booleans(),
)
def test_any_size(rows, columns, activation, fused) -> None:
    both = _randn(rows, 2 * columns)
    gate, up = both.chunk(2, dim=-1) if fused else (both[:, :columns].clone(), both[:, columns:].clone())
    gate.requires_grad_(), up.requires_grad_()
    upstream = _randn(rows, columns, seed=1)
    mine, true = glu(gate, up, activation), plain(gate, up, activation)
    torch.testing.assert_close(mine, true)
    torch.testing.assert_close(
        torch.autograd.grad(mine, (gate, up), upstream), torch.autograd.grad(true, (gate, up), upstream)
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biased", (False, True))
def test_gated_mlp_gradients_by_differences(activation: str, biased: bool) -> None:
    weights = _mlp(3, 5, biased, torch.float64)
    inputs = [_randn(2, 3, dtype=torch.float64), *weights.values()]
    inputs = [t.requires_grad_() for t in inputs]
    assert gradcheck(lambda x, *w: gated_mlp(x, **dict(zip(weights, w)), activation=activation), inputs)


@pytest.mark.parametrize("gate_first", (True, False))
@pytest.mark.parametrize("biased", (False, True))
def test_chunks_of_one_weight_are_one_product(gate_first: bool, biased: bool, monkeypatch) -> None:
    linear = torch.nn.functional.linear
    fused = (_randn(40, 12) / 4).requires_grad_()
    bias = _randn(40, seed=1).requires_grad_() if biased else None
    x, down = _randn(2, 3, 12, seed=2).requires_grad_(), (_randn(12, 20, seed=3) / 4).requires_grad_()

    def arguments():
        one, other = fused.chunk(2)
        named = {"gate_weight": one, "up_weight": other, "down_weight": down}
        if bias is not None:
            named["gate_bias"], named["up_bias"] = bias.chunk(2)
        if not gate_first:
            for what in ("weight", "bias") if biased else ("weight",):
                named[f"gate_{what}"], named[f"up_{what}"] = named[f"up_{what}"], named[f"gate_{what}"]
        return named

    wanted = [t for t in (x, fused, down, bias) if t is not None]
    true = reference("gated_mlp")(x, **arguments())
    upstream = torch.randn_like(true)
    expected = torch.autograd.grad(true, wanted, upstream)
    products = []
    monkeypatch.setattr(
        module.F, "linear", lambda x, w, b=None: (products.append(tuple(w.shape)), linear(x, w, b))[1]
    )
    mine = gated_mlp(x, **arguments())
    assert products == [(40, 12), (12, 20)]
    torch.testing.assert_close(mine, true)
    torch.testing.assert_close(torch.autograd.grad(mine, wanted, upstream), expected)
    products.clear()
    with torch.no_grad():
        torch.testing.assert_close(gated_mlp(x, **arguments()), true)
    assert products == [(40, 12), (12, 20)]


@pytest.mark.parametrize("compiled", (False, True))
def test_the_hidden_activation_is_not_kept(compiled: bool) -> None:
    """Three tensors of the inner width would be: gate, up and their product. Two are."""
    weights = {name: weight.requires_grad_() for name, weight in _mlp(12, 20).items()}
    x = _randn(7, 12).requires_grad_()
    function = torch.compile(gated_mlp, fullgraph=True, backend="aot_eager") if compiled else gated_mlp
    function(x, **weights)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        function(x, **weights)
    assert kept.count((7, 20)) == 2


@pytest.mark.parametrize("wanted", ("x", "gate_weight", "down_weight", "down_bias"))
def test_one_gradient_alone(wanted: str) -> None:
    arguments = {"x": _randn(7, 12), **_mlp(12, 20, True)}
    arguments[wanted].requires_grad_()
    mine = torch.autograd.grad(gated_mlp(**arguments).sum(), arguments[wanted])
    true = torch.autograd.grad(reference("gated_mlp")(**arguments).sum(), arguments[wanted])
    torch.testing.assert_close(mine, true)


def test_compiled() -> None:
    gate, up = _randn(3, 40).requires_grad_(), _randn(3, 40, seed=1).requires_grad_()
    compiled = torch.compile(glu, fullgraph=True, backend="aot_eager")
    mine, true = compiled(gate, up, "gelu_tanh"), glu(gate, up, "gelu_tanh")
    torch.testing.assert_close(mine, true, rtol=0, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(mine.sum(), (gate, up)), torch.autograd.grad(true.sum(), (gate, up))
    )
    arguments = {name: t.requires_grad_() for name, t in _mlp(12, 20, True).items()}
    x = _randn(2, 3, 12).requires_grad_()
    compiled = torch.compile(gated_mlp, fullgraph=True, backend="aot_eager")
    mine, true = compiled(x, **arguments), gated_mlp(x, **arguments)
    torch.testing.assert_close(mine, true)
    wanted = [x, *arguments.values()]
    torch.testing.assert_close(
        torch.autograd.grad(mine.sum(), wanted), torch.autograd.grad(true.sum(), wanted)
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, **arguments), true)


def test_autocast_decides_the_dtype() -> None:
    weights = {name: t.requires_grad_() for name, t in _mlp().items()}
    x = _randn(3, 12).requires_grad_()
    with torch.autocast(DEVICE, torch.float16):
        out = gated_mlp(x, **weights)
    assert out.dtype == torch.float16
    grads = torch.autograd.grad(out.sum(), [x, *weights.values()])
    assert all(grad.dtype == torch.float32 for grad in grads)


def test_nothing_in_nothing_out() -> None:
    gate = torch.zeros(0, 8, device=DEVICE, requires_grad=True)
    out = glu(gate, gate)
    assert out.shape == (0, 8)
    assert torch.autograd.grad(out.sum(), gate)[0].shape == (0, 8)
    weights = {name: t.requires_grad_() for name, t in _mlp().items()}
    out = gated_mlp(torch.zeros(0, 12, device=DEVICE), **weights)
    assert out.shape == (0, 12)
    grads = torch.autograd.grad(out.sum(), list(weights.values()))
    assert all(not grad.any() for grad in grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": torch.zeros(3, 8, dtype=torch.int32)}, "gate is int32"),
        ({"up": torch.zeros(3, 9)}, r"up is of shape \(3, 9\); supported: shape \(3, 8\)"),
        ({"up": torch.zeros(3, 8, dtype=torch.float16)}, "up is float16"),
        ({"activation": "tanh"}, "activation is 'tanh'; supported: silu, gelu"),
    ],
)
def test_bad_arguments_are_named(change, message: str) -> None:
    arguments = {"gate": torch.zeros(3, 8), "up": torch.zeros(3, 8), **change}
    arguments = {n: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
    with pytest.raises(KernelInputError, match=f"^glu: {message}"):
        glu(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up_weight": torch.zeros(20, 11)}, r"up_weight is of shape \(20, 11\)"),
        ({"down_weight": torch.zeros(12, 21)}, "down_weight is of shape"),
        ({"down_bias": torch.zeros(20)}, "down_bias is of shape"),
        ({"gate_weight": torch.zeros(20)}, "gate_weight is of 1 dimensions"),
        ({"gate_weight": torch.zeros(20, 12, dtype=torch.float16)}, "gate_weight is float16"),
    ],
)
def test_bad_weights_are_named(change, message: str) -> None:
    arguments = {"x": _randn(3, 12), **_mlp(), **{name: t.to(DEVICE) for name, t in change.items()}}
    with pytest.raises(KernelInputError, match=f"^gated_mlp: {message}"):
        gated_mlp(**arguments)
