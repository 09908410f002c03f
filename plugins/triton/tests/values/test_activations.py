"""bias_activation against fp64: values, gradients, layouts, sizes, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_suite import TritonSuite, gradcheck

import kpt_plugin_triton.plugin as plugin
from kpt_plugin_triton.activations import ACTIVATIONS, bias_activation
from kpt_plugin_triton.checks import KernelInputError
from kpt_plugin_triton.references.activations import bias_activation as plain

KERNELS = {spec.op: spec for spec in plugin.kpt_kernels()}
DEVICE = TritonSuite.device


def _randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).to(DEVICE)


class TestBiasActivation(TritonSuite):
    kernel = KERNELS["bias_activation"]

    def arguments(self):
        return {"x": _randn(2, 6, 32), "bias": _randn(32, seed=1), "activation": "gelu"}

    def reference(self):
        return plain


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    activation=st.sampled_from(ACTIVATIONS),
    biased=st.booleans(),
)
def test_any_size(rows, columns, activation, biased) -> None:
    x = _randn(rows, columns).requires_grad_()
    bias = _randn(columns, seed=1).requires_grad_() if biased else None
    wanted = [t for t in (x, bias) if t is not None]
    upstream = _randn(rows, columns, seed=2)
    mine, true = bias_activation(x, bias, activation), plain(x, bias, activation)
    torch.testing.assert_close(mine, true)
    torch.testing.assert_close(
        torch.autograd.grad(mine, wanted, upstream),
        torch.autograd.grad(true, wanted, upstream),
        rtol=1e-4,
        atol=1e-5,
    )


def _gelu(x: torch.Tensor) -> torch.Tensor:
    """Without 1 + erf, which loses all digits of what is far below zero."""
    return x * 0.5 * torch.special.erfc(-x / 2**0.5)


@pytest.mark.parametrize("scale", [0.05, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gelu_is_as_near_as_eager_is(dtype: torch.dtype, scale: float) -> None:
    x = (_randn(64, 64) * scale).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    exact = _gelu(wide)
    true = exact, *torch.autograd.grad(exact.sum(), wide)
    errors = []
    for function in (lambda x: bias_activation(x, None, "gelu"), torch.nn.functional.gelu):
        out = function(x)
        found = out, *torch.autograd.grad(out.sum(), x)
        errors.append([float((a.double() - b).norm() / b.norm()) for a, b in zip(found, true)])
    assert all(mine <= 1.3 * eager for mine, eager in zip(*errors)), errors


def test_gelu_in_half_precision_keeps_its_digits_far_below_zero() -> None:
    """0.5 (1 + erf) cancels them: at -5 nothing but noise is left of it."""
    x = torch.linspace(-5.0, 5.0, 513, device=DEVICE, dtype=torch.float16)
    mine = bias_activation(x, None, "gelu")
    torch.testing.assert_close(mine.double(), _gelu(x.double()), rtol=1.1 * 2.0**-11, atol=2.0**-25)


def test_gelu_of_what_is_no_number() -> None:
    huge = float("inf")
    for dtype in (torch.float32, torch.float16):
        x = torch.tensor([float("nan"), huge, -huge, -0.0, 0.0, 6e4, -6e4], device=DEVICE, dtype=dtype)
        mine = bias_activation(x, None, "gelu")
        # In double: torch's own in fp16 makes a NaN of infinity on CPUs with AVX512-FP16.
        expected = torch.nn.functional.gelu(x.double()).to(dtype)
        torch.testing.assert_close(mine, expected, rtol=0, atol=0, equal_nan=True)


def test_many_rows_are_summed_in_a_fixed_order() -> None:
    x, bias = _randn(3000, 33).requires_grad_(), _randn(33, seed=1).requires_grad_()
    upstream = _randn(3000, 33, seed=2)
    first, second = (
        torch.autograd.grad(bias_activation(x, bias, "silu"), (x, bias), upstream) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    wide = [t.detach().double().requires_grad_() for t in (x, bias)]
    expected = torch.autograd.grad(plain(*wide, "silu"), wide, upstream.double())
    torch.testing.assert_close([t.double() for t in first], list(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_by_differences(activation: str) -> None:
    inputs = _randn(3, 5, dtype=torch.float64).requires_grad_(), _randn(5, dtype=torch.float64, seed=1)
    assert gradcheck(lambda *a: bias_activation(*a, activation), inputs)


def test_compiled() -> None:
    x, bias = _randn(3, 40).requires_grad_(), _randn(40, seed=1).requires_grad_()
    compiled = torch.compile(bias_activation, fullgraph=True, backend="aot_eager")
    mine, true = compiled(x, bias), bias_activation(x, bias)
    torch.testing.assert_close(mine, true, rtol=0, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(mine.sum(), (x, bias)), torch.autograd.grad(true.sum(), (x, bias))
    )


def test_nothing_in_nothing_out() -> None:
    x, bias = torch.zeros(0, 8, device=DEVICE), torch.zeros(8, device=DEVICE, requires_grad=True)
    out = bias_activation(x, bias)
    assert out.shape == (0, 8)
    assert not torch.autograd.grad(out.sum(), bias)[0].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 8, dtype=torch.int32)}, "x is int32"),
        ({"bias": torch.zeros(9)}, r"bias is of shape \(9,\); supported: shape \(8,\)"),
        ({"activation": "softplus"}, "activation is 'softplus'"),
    ],
)
def test_bad_arguments_are_named(change, message: str) -> None:
    arguments = {"x": torch.zeros(3, 8), "bias": torch.zeros(8), **change}
    arguments = {n: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
    with pytest.raises(KernelInputError, match=f"^bias_activation: {message}"):
        bias_activation(**arguments)
