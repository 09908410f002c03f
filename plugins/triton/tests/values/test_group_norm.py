"""group_norm against fp64: values, gradients, layouts, groups of every size, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_suite import InOneDtype, TritonSuite, gradcheck

import kpt_plugin_triton.plugin as plugin
from kpt_plugin_triton import group_norm_launches as launches
from kpt_plugin_triton import group_norm_stripes as stripes
from kpt_plugin_triton.checks import KernelInputError
from kpt_plugin_triton.group_norm import group_norm
from kpt_plugin_triton.launch import INTERPRETED
from kpt_plugin_triton.references.group_norm import group_norm as plain

KERNELS = {spec.op: spec for spec in plugin.kpt_kernels()}
DEVICE = TritonSuite.device


def _randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).to(DEVICE)


class TestGroupNorm(TritonSuite):
    kernel = KERNELS["group_norm"]
    most_rows = 9 if INTERPRETED else 70

    def arguments(self):
        return {
            "x": _randn(2, 12, 7, 5),
            "groups": 4,
            "weight": _randn(12, seed=1),
            "bias": _randn(12, seed=2),
        }

    def reference(self):
        return plain


class TestGroupNormSilu(TestGroupNorm):
    def arguments(self):
        return {**super().arguments(), "activation": "silu"}


class TestLargeGroups(InOneDtype, TestGroupNormSilu):
    """Groups that many programs share, made small enough for the interpreter."""

    rows = (1, 3)

    def arguments(self):
        """Four blocks of 32 elements in each group, for two programs."""
        weight, bias = _randn(6, seed=1), _randn(6, seed=2)
        return {"x": _randn(2, 6, 7, 5), "groups": 2, "weight": weight, "bias": bias, "activation": "silu"}

    @pytest.fixture(autouse=True)
    def small_registers(self, monkeypatch):
        monkeypatch.setattr(launches, "_LARGEST", 8)
        monkeypatch.setattr(launches, "_LARGEST_BACKWARD", 8)
        options = {"ELEMENTS": 32, "PROGRAMS": 2, "num_warps": 1}
        for module in (launches, stripes):
            monkeypatch.setattr(module, "forward_options", lambda *sizes: options)
            monkeypatch.setattr(module, "backward_options", lambda *sizes: options)


class TestStripes(TestLargeGroups):
    """The same with the channels of a spot side by side, of three groups, for two stripes of 4 channels."""

    def arguments(self):
        weight, bias = _randn(6, seed=1), _randn(6, seed=2)
        x = _randn(2, 6, 7, 5).contiguous(memory_format=torch.channels_last)
        return {"x": x, "groups": 3, "weight": weight, "bias": bias, "activation": "silu"}

    @pytest.fixture(autouse=True)
    def narrow_stripes(self, monkeypatch):
        monkeypatch.setattr(stripes, "_ACROSS", (4,))
        called = []
        for name in ("forward", "backward"):
            launch = getattr(stripes, name)
            monkeypatch.setattr(stripes, name, lambda *a, n=name, run=launch: (called.append(n), run(*a))[1])
        return called

    def test_stripes_are_what_runs(self, narrow_stripes) -> None:
        arguments = self.arguments()
        x = arguments["x"].requires_grad_()
        group_norm(**arguments).sum().backward()
        assert narrow_stripes == ["forward", "backward"] and x.grad.stride() == x.stride()


def _compare(x, groups, weight, bias, activation, rtol=1e-4, atol=1e-4) -> None:
    wanted = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    upstream = torch.randn_like(x)
    mine = group_norm(x, groups, weight, bias, activation=activation)
    wide = [t if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias)]
    true = plain(wide[0], groups, wide[1], wide[2], activation=activation)
    torch.testing.assert_close(mine.double(), true, rtol=rtol, atol=atol)
    expected = torch.autograd.grad(true, [t for t in wide if t is not None], upstream.double())
    for grad, right in zip(torch.autograd.grad(mine, wanted, upstream), expected):
        torch.testing.assert_close(grad.double(), right, rtol=rtol, atol=atol * float(right.abs().max()))


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 4),
    group=st.integers(1, 6),
    spots=st.lists(st.integers(1, 9), max_size=3),
    affine=st.sampled_from(("both", "weight", "bias", "none")),
    activation=st.sampled_from((None, "silu")),
    last=st.booleans(),
)
def test_any_size(batch, groups, group, spots, affine, activation, last) -> None:
    channels = groups * group
    x = _randn(batch, channels, *spots)
    if last and len(spots) == 1:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif last and len(spots) > 1:
        x = x.to(memory_format=torch.channels_last if len(spots) == 2 else torch.channels_last_3d)
    weight = _randn(channels, seed=1) if affine in ("both", "weight") else None
    bias = _randn(channels, seed=2) if affine in ("both", "bias") else None
    if group * x[0, 0].numel() > 2:  # one element becomes 0, two become -1 and 1: no gradient but noise
        _compare(x, groups, weight, bias, activation)


@pytest.mark.parametrize("last", (False, True))
@pytest.mark.parametrize("mean", (0.0, 300.0))
def test_groups_beyond_the_registers(last: bool, mean: float) -> None:
    """24000 elements a group, also with a mean that is far from zero: no digits cancel."""
    x = _randn(2, 6, 80, 100) + mean
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    _compare(x, 2, _randn(6, seed=1), _randn(6, seed=2), "silu", rtol=2e-4, atol=2e-4)


def test_channels_last_stays_so_and_is_not_copied(monkeypatch) -> None:
    x = _randn(2, 8, 4, 5).contiguous(memory_format=torch.channels_last)
    seen = []
    launch = launches._forward
    monkeypatch.setattr(launches, "_forward", lambda *call: (seen.append(call[1][0]), launch(*call)))
    y = group_norm(x, 4)
    assert seen[0].data_ptr() == x.data_ptr()
    assert y.stride() == x.stride()
    tokens = _randn(2, 5, 8).transpose(1, 2)
    assert group_norm(tokens, 4).stride() == tokens.stride()
    assert seen[1].data_ptr() == tokens.data_ptr()
    torch.testing.assert_close(y, plain(x, 4))


@pytest.mark.parametrize("last", (False, True))
def test_gradients_by_differences(last: bool) -> None:
    x = _randn(2, 4, 3, 2, dtype=torch.float64)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    inputs = tuple(
        t.requires_grad_()
        for t in (x, _randn(4, dtype=torch.float64, seed=1), _randn(4, dtype=torch.float64, seed=2))
    )
    assert gradcheck(lambda x, w, b: group_norm(x, 2, w, b, 1e-2, "silu"), inputs)


@pytest.mark.parametrize("wanted", ("x", "weight", "bias"))
def test_one_gradient_alone(wanted: str) -> None:
    arguments = {"x": _randn(2, 8, 5), "weight": _randn(8, seed=1), "bias": _randn(8, seed=2)}
    arguments[wanted].requires_grad_()
    upstream = _randn(2, 8, 5, seed=3)
    mine = torch.autograd.grad(group_norm(groups=2, **arguments), arguments[wanted], upstream)
    true = torch.autograd.grad(plain(groups=2, **arguments), arguments[wanted], upstream)
    torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-5)


def test_compiled() -> None:
    x = _randn(2, 8, 3, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = _randn(8, seed=1).requires_grad_(), _randn(8, seed=2).requires_grad_()
    compiled = torch.compile(group_norm, fullgraph=True, backend="aot_eager")
    mine, true = compiled(x, 4, weight, bias), group_norm(x, 4, weight, bias)
    torch.testing.assert_close(mine, true, rtol=0, atol=0)
    assert mine.stride() == true.stride()
    upstream = torch.randn_like(true)
    torch.testing.assert_close(
        torch.autograd.grad(mine, (x, weight, bias), upstream),
        torch.autograd.grad(true, (x, weight, bias), upstream),
    )


def test_nothing_in_nothing_out() -> None:
    weight = torch.ones(8, device=DEVICE, requires_grad=True)
    out = group_norm(torch.zeros(0, 8, 5, device=DEVICE), 2, weight)
    assert out.shape == (0, 8, 5)
    assert not torch.autograd.grad(out.sum(), weight)[0].any()
    assert group_norm(torch.zeros(2, 8, 0, device=DEVICE), 2).shape == (2, 8, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, 3, dtype=torch.int32)}, "x is int32"),
        ({"x": torch.zeros(8)}, "x is of 1 dimensions; supported: at least 2"),
        ({"groups": 3}, "groups is 3 for 8 channels; supported: a divisor"),
        ({"groups": 2.0}, "groups is 2.0"),
        ({"weight": torch.zeros(4)}, r"weight is of shape \(4,\); supported: shape \(8,\)"),
        ({"activation": "relu"}, "activation is 'relu'; supported: None, silu"),
    ],
)
def test_bad_arguments_are_named(change, message: str) -> None:
    arguments = {"x": torch.zeros(2, 8, 3), "groups": 2, **change}
    arguments = {n: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
    with pytest.raises(KernelInputError, match=f"^group_norm: {message}"):
        group_norm(**arguments)
