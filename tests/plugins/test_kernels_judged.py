"""``kpt.testing.KernelSuite`` tells right kernels from wrong ones, each by the test that names the rule."""

from __future__ import annotations

from unittest import SkipTest

import pytest
import torch

from conformance import HOME, failures, outcomes, plugin_of, plugin_suite
from kpt.plugins.validation import CORE_OPS
from kpt.specs import KernelSpec
from kpt.testing import KernelSuite


def right(x, dim=-1):
    return torch.softmax(x, dim)


def one_percent_off(x, dim=-1):
    return torch.softmax(x, dim) * 1.01


def even_only(x, dim=-1):
    y = torch.softmax(x, dim)
    return y if x.shape[-2] % 2 == 0 else y * 1.1


def contiguous_only(x, dim=-1):
    y = torch.softmax(x, dim)
    return y if x.is_contiguous() else y * 1.1


def modifies(x, dim=-1):
    y = torch.softmax(x, dim)
    x.detach().add_(1.0)
    return y


def overflows(x, dim=-1):
    e = x.exp()
    e = torch.where(x.abs() > 20, torch.full_like(e, float("nan")), e)
    return e / e.sum(dim, keepdim=True)


def partly_written(x, dim=-1):
    y = torch.empty(x.shape, dtype=x.dtype)
    y[..., 1:] = torch.softmax(x, dim)[..., 1:]
    y[..., :1] = torch.where(torch.isnan(y[..., :1]), y[..., :1], torch.softmax(x, dim)[..., :1])
    return y


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim):
        y = torch.softmax(x, dim)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return gradient * y, None


def wrong_gradient(x, dim=-1):
    return _WrongGradient.apply(x, dim)


def ignores_dim(x, dim=-1):
    return torch.softmax(x, -1)


def refuses_other_dims(x, dim=-1):
    if dim not in (-1, x.dim() - 1):
        raise ValueError(f"dim is {dim}; supported: the last one")
    return torch.softmax(x, dim)


def breaks_on_other_dims(x, dim=-1):
    """By an error as a kernel's launch raises it: nobody meant to refuse."""
    if dim not in (-1, x.dim() - 1):
        raise RuntimeError("invalid configuration argument")
    return torch.softmax(x, dim)


KERNELS = {
    right: set(),
    breaks_on_other_dims: {"test_other_arguments"},
    ignores_dim: {"test_other_arguments"},
    refuses_other_dims: set(),
    one_percent_off: {"test_values"},
    even_only: {"test_odd_sizes"},
    contiguous_only: {"test_strides"},
    modifies: {"test_values"},
    partly_written: {"test_values"},
    overflows: {"test_small_and_large_values"},
    wrong_gradient: {"test_gradients"},
}


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda function: function.__name__)
def test_kernels_are_judged(home, kernel):
    home.kernel = kernel
    spec = KernelSpec("softmax", "k", f"{HOME}:kernel", backward=True, reproducible=True)
    suite = type("TestIt", (KernelSuite,), {"kernel": spec})()
    found = failures(suite)
    # A kernel that is wrong at once fails wherever it is called; the first test says why.
    assert KERNELS[kernel] <= set(found), found
    if not KERNELS[kernel] or "test_values" not in KERNELS[kernel]:
        assert set(found) <= KERNELS[kernel] | {"test_gradients", "test_random_sizes"}, found


def test_a_registered_op_without_an_argument_refuses_it(home):
    """For an argument that a schema lacks torch raises a RuntimeError; a function raises a TypeError."""

    @torch.library.custom_op("kpt_test_judged::add_rms_norm", mutates_args=())
    def add_rms_norm(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        summed = x + residual
        return torch.rms_norm(summed, x.shape[-1:], weight, eps), summed.clone()

    home.kernel = add_rms_norm
    suite = type("TestIt", (KernelSuite,), {"kernel": KernelSpec("add_rms_norm", "k", f"{HOME}:kernel")})()
    assert "test_other_arguments" not in failures(suite)


def test_a_kernel_that_prepares_sites_is_judged_on_one(home):
    def packed(factor):
        def setup(site):
            weights = site.weights()
            matrix = (weights["weight"] * factor).detach().clone()

            def run(x, weight, bias=None):
                return torch.nn.functional.linear(x, matrix.to(x.dtype), bias)

            return run

        return setup

    def linear(x, weight, bias=None):
        return torch.nn.functional.linear(x, weight, bias)

    home.entry = linear
    spec = KernelSpec(
        "linear", "packed", f"{HOME}:entry", setup=f"{HOME}:setup", dtypes=("float32", "bfloat16")
    )
    suite = type("TestIt", (KernelSuite,), {"kernel": spec})()
    home.setup = packed(1.0)
    assert not failures(suite)
    assert outcomes(suite)["test_values"] == ""
    home.setup = packed(1.01)
    assert failures(suite)["test_values"].startswith("linear/packed in torch.float32: value")


def test_a_kernel_that_refuses_the_typical_site_is_skipped(home):
    home.kernel, home.supports = right, lambda site: "only for sequences above 4096"
    spec = KernelSpec("softmax", "k", f"{HOME}:kernel", supports=f"{HOME}:supports")
    suite = type("TestIt", (KernelSuite,), {"kernel": spec})()
    with pytest.raises(SkipTest, match="above 4096"):
        suite.test_values()


def test_plugin_suite_judges_kernels_of_known_ops(home):
    home.kernel = one_percent_off
    plugin = plugin_of(kpt_kernels=[KernelSpec("softmax", "k", f"{HOME}:kernel")])
    found = failures(plugin_suite(plugin))
    assert set(found) == {"test_kernels_equal_their_references"}
    assert found["test_kernels_equal_their_references"].startswith("softmax/k in torch.float32: value")


def test_references_themselves_pass_as_kernels():
    for op in CORE_OPS:
        suite = type(
            "TestReference",
            (KernelSuite,),
            {"kernel": KernelSpec(op, "reference", "math:sqrt"), "run": KernelSuite.reference},
        )()
        assert not failures(suite), op


@pytest.mark.parametrize("refused", [True, False])
def test_other_arguments_are_not_asked_for_where_supports_refuses_them(home, refused):
    """A norm that adds nothing to its weight: right for all sites that it says it takes."""
    home.kernel = lambda x, weight=None, eps=1e-6, offset=0.0: torch.rms_norm(x, x.shape[-1:], weight, eps)
    home.supports = lambda site: "an offset" if refused and float(site.weights().get("offset", 0.0)) else None
    spec = KernelSpec("rms_norm", "k", f"{HOME}:kernel", supports=f"{HOME}:supports")
    found = failures(type("TestIt", (KernelSuite,), {"kernel": spec})())
    assert set(found) == (set() if refused else {"test_other_arguments"}), found
    assert refused or "with another offset: value" in found["test_other_arguments"]
