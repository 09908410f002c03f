"""softmax against fp64: values, gradients, dimensions, rows too long for registers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_suite import TritonSuite, gradcheck

import kpt_plugin_triton.plugin as plugin
from kpt_plugin_triton import softmax as family
from kpt_plugin_triton.checks import KernelInputError
from kpt_plugin_triton.softmax import softmax

DEVICE = TritonSuite.device
KERNELS = {spec.op: spec for spec in plugin.kpt_kernels()}


class TestSoftmax(TritonSuite):
    kernel = KERNELS["softmax"]


def _compare(x: torch.Tensor, dim: int) -> None:
    mine = x.clone().requires_grad_()
    true = x.double().requires_grad_()
    y, wide = softmax(mine, dim), torch.softmax(true, dim)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    y.backward(dy)
    wide.backward(dy.double())
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if x.dtype != torch.float16 else {"rtol": 2e-3, "atol": 1e-3}
    torch.testing.assert_close(y.double(), wide, **tolerance)
    torch.testing.assert_close(mine.grad.double(), true.grad, **tolerance)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_dimension(dim: int, dtype: torch.dtype) -> None:
    _compare(torch.randn(3, 5, 17, device=DEVICE).to(dtype), dim)


@pytest.mark.parametrize("columns", [16385, 40000, 65537])
def test_rows_that_do_not_fit_in_registers(columns: int) -> None:
    x = torch.randn(2, columns, device=DEVICE)
    x[0, columns - 1] = 30.0  # the largest comes last
    _compare(x, -1)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 3), st.integers(0, 1000))
def test_any_size_and_spacing(rows: int, columns: int, gap: int, seed: int) -> None:
    torch.manual_seed(seed)
    _compare(torch.randn(rows, columns + gap, device=DEVICE)[:, :columns], 1)


@pytest.mark.parametrize(("columns", "gap", "start"), [(24, 8, 0), (24, 4, 8), (40, 0, 0), (20, 12, 1)])
def test_rows_spaced_by_any_unit(columns: int, gap: int, start: int) -> None:
    """Rows, and their distance, of a multiple of 8, 4, 2 or 1 elements, from an address of any alignment."""
    wide = torch.randn(9, columns + gap + start, device=DEVICE).to(torch.float16)
    _compare(wide[:, start : start + columns], -1)


def test_minus_infinity_is_probability_zero() -> None:
    x = torch.randn(3, 40000, device=DEVICE)
    x[0, :39990] = float("-inf")
    x[1] = float("-inf")
    expected = torch.softmax(x, -1)
    torch.testing.assert_close(softmax(x), expected, equal_nan=True)
    torch.testing.assert_close(softmax(x[:, 39000:]), torch.softmax(x[:, 39000:], -1), equal_nan=True)


def test_empty_and_gradcheck() -> None:
    assert softmax(torch.empty(0, 7, device=DEVICE)).shape == (0, 7)
    x = torch.randn(3, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert gradcheck(softmax, (x,))


def test_compiled_with_gradients() -> None:
    x = torch.randn(4, 33, device=DEVICE, requires_grad=True)
    run = torch.compile(lambda x: softmax(x * 2, 0), fullgraph=True, backend="aot_eager")
    (mine,) = torch.autograd.grad(run(x).square().sum(), x)
    (true,) = torch.autograd.grad(torch.softmax(x * 2, 0).square().sum(), x)
    torch.testing.assert_close(mine, true)


@pytest.mark.parametrize(
    ("x", "dim", "message"),
    [
        (torch.ones(2, 3, dtype=torch.int64), -1, "x is int64"),
        (torch.ones(2, 3), 2, "dim is 2; supported: an integer from -2 to 1"),
        (torch.tensor(1.0), 0, "x is of 0 dimensions"),
        ([1.0], 0, "x is a list"),
    ],
)
def test_refuses_by_name(x: object, dim: int, message: str) -> None:
    if isinstance(x, torch.Tensor):
        x = x.to(DEVICE)
    with pytest.raises(KernelInputError, match=message):
        softmax(x, dim)  # type: ignore[arg-type]


def test_rule_gives_whole_warps() -> None:
    for columns in (1, 63, 1024, 8192, 32768):
        for itemsize in (2, 4):
            options = family.forward_options.rule(itemsize, columns)
            assert options["num_warps"] in (4, 8, 16)
            assert options in [*family.forward_options.candidates(itemsize, columns), options]
