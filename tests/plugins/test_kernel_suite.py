"""`KernelSuite`: what each test looks at, half precision, streams, scratch memory, errors of gradients."""

from __future__ import annotations

import contextlib
import sys
import types
from unittest import SkipTest

import pytest
import torch

from kpt.specs import KernelSpec
from kpt.testing import KernelSuite

HOME = "kpt_test_kernel_suite"


@pytest.fixture
def suite_of(monkeypatch):
    """Makes a suite for a softmax that is given as a function."""

    def make(kernel, **how):
        module = types.ModuleType(HOME)
        module.kernel = kernel
        monkeypatch.setitem(sys.modules, HOME, module)
        spec = KernelSpec("softmax", "k", f"{HOME}:kernel", dtypes=("float16",), **how)
        return type("TestIt", (KernelSuite,), {"kernel": spec})()

    return make


class Softmax(torch.autograd.Function):
    """Right, with a backward that subclasses change."""

    @staticmethod
    def forward(ctx, x, dim):
        y = torch.softmax(x, dim)
        ctx.save_for_backward(y)
        ctx.dim = dim
        return y

    @classmethod
    def gradient(cls, y, upstream, dim):
        return y * (upstream - (y * upstream).sum(dim, keepdim=True))

    @classmethod
    def backward(cls, ctx, upstream):
        (y,) = ctx.saved_tensors
        return cls.gradient(y.float(), upstream.float(), ctx.dim).to(upstream.dtype), None


class Coarse(Softmax):
    """A gradient whose upstream lost bits: 8 of them are within some tolerances, not within eager's error."""

    @classmethod
    def gradient(cls, y, upstream, dim):
        return super().gradient(y, upstream.to(torch.float8_e4m3fn).float(), dim)


class Scratch(Softmax):
    """Every call leaves its result in the same place, and the backward pass reads it there."""

    last: torch.Tensor

    @staticmethod
    def forward(ctx, x, dim):
        Scratch.last = torch.softmax(x, dim)
        ctx.dim = dim
        return Scratch.last.clone()

    @classmethod
    def backward(cls, ctx, upstream):
        return cls.gradient(cls.last, upstream, ctx.dim), None


def applied(function):
    def kernel(x, dim=-1):
        return function.apply(x, dim)

    return kernel


def coarse(x, dim=-1):
    """What drops to 8 bits in between."""
    return torch.softmax(x.to(torch.float8_e4m3fn).to(x.dtype), dim)


def test_errors_of_gradients_are_compared_with_those_of_eager(suite_of):
    suite_of(applied(Softmax), backward=True).test_gradient_error_like_eager()
    suite = suite_of(applied(Coarse), backward=True)
    suite.test_error_like_eager()
    with pytest.raises(
        AssertionError, match=r"softmax/k in torch.float16: the gradient of x error .* eager's"
    ):
        suite.test_gradient_error_like_eager()
    with pytest.raises(SkipTest, match="declares no backward"):
        suite_of(coarse).test_gradient_error_like_eager()


def test_ordinary_inputs_are_judged_by_one_test_and_not_again_by_each(suite_of):
    calls = []

    def counted(x, dim=-1):
        calls.append(x.shape)
        return torch.softmax(x, dim)

    suite = suite_of(counted, reproducible=True)
    suite.test_reproducible()
    assert len(calls) == 2
    calls.clear()
    suite.test_odd_sizes()
    assert len(calls) == len(suite.rows)
    with pytest.raises(AssertionError, match="softmax/k in torch.float16: value"):
        suite_of(lambda x, dim=-1: torch.softmax(x, dim) * 1.1).test_values()


def test_a_test_of_ones_own_that_asks_for_no_probes_judges_ordinary_inputs(suite_of):
    suite_of(torch.softmax).verdict()
    with pytest.raises(AssertionError, match="softmax/k"):
        suite_of(lambda x, dim: torch.softmax(x, dim) * 1.01).verdict()


def test_a_missing_gradient_is_named(suite_of):
    def detached(x, dim=-1):
        return torch.softmax(x.detach(), dim)

    with pytest.raises(AssertionError, match="softmax/k gives x no gradient"):
        suite_of(detached, backward=True).test_gradient_error_like_eager()


def test_no_level_excuses_errors(suite_of):
    suite_of(applied(Softmax), level="aggressive").test_error_like_eager()
    with pytest.raises(AssertionError, match="in torch.float16: error"):
        suite_of(coarse, level="aggressive").test_error_like_eager()


@pytest.mark.parametrize("reproducible", [True, False])
def test_backward_passes_on_two_streams_are_told_apart(suite_of, monkeypatch, reproducible):
    device = types.SimpleNamespace(
        Stream=object, synchronize=lambda: None, stream=lambda lane: contextlib.nullcontext()
    )
    monkeypatch.setattr(torch, "get_device_module", lambda name: device)
    monkeypatch.setattr(KernelSuite, "_accelerator", lambda self, name: getattr(device, name))
    suite_of(applied(Softmax), backward=True, reproducible=reproducible).test_two_streams()
    suite_of(applied(Softmax)).test_two_streams()
    with pytest.raises(AssertionError, match="not (equal|close)"):
        suite_of(applied(Scratch), backward=True, reproducible=reproducible).test_two_streams()
