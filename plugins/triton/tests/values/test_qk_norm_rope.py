"""qk_norm_rope against fp64: values, gradients, layouts, sizes, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_suite import TritonSuite, gradcheck

import kpt_plugin_triton.plugin as plugin
from kpt_plugin_triton.checks import KernelInputError
from kpt_plugin_triton.launch import INTERPRETED
from kpt_plugin_triton.qk_norm_rope import qk_norm_rope
from kpt_plugin_triton.references.qk_norm_rope import qk_norm_rope as plain

KERNELS = {spec.op: spec for spec in plugin.kpt_kernels()}
DEVICE = TritonSuite.device
NAMES = ("q", "k", "q_weight", "k_weight", "cos", "sin")


def _inputs(batch=2, heads=4, kv=2, sequence=5, width=16, turning=16, tables=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype).to(DEVICE)

    q = randn(batch, sequence, heads, width).transpose(1, 2)
    k = randn(batch, sequence, kv, width).transpose(1, 2)
    return (
        q,
        k,
        randn(width),
        randn(width),
        randn(tables, sequence, turning),
        randn(tables, sequence, turning),
    )


class TestQkNormRope(TritonSuite):
    kernel = KERNELS["qk_norm_rope"]
    most_rows = 7 if INTERPRETED else 70

    def arguments(self):
        return dict(zip(NAMES, _inputs(sequence=6, width=8, turning=8)))

    def reference(self):
        return plain


class TestPartial(TestQkNormRope):
    """Interleaved, with features that do not turn and weights that count from one."""

    def arguments(self):
        named = dict(zip(NAMES, _inputs(sequence=6, width=14, turning=8, tables=2)))
        return {**named, "eps": 1e-5, "offset": 1.0, "interleaved": True}


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 5),
    kv=st.integers(1, 3),
    sequence=st.integers(1, 9),
    half=st.integers(1, 9),
    rest=st.integers(0, 5),
    interleaved=st.booleans(),
    token_major=st.booleans(),
    weighed=st.booleans(),
)
def test_any_size(batch, heads, kv, sequence, half, rest, interleaved, token_major, weighed) -> None:
    q, k, *weights, cos, sin = _inputs(batch, heads, kv, sequence, 2 * half + rest, 2 * half, batch)
    if not token_major:
        q, k = q.contiguous(), k.contiguous()
    if not weighed:
        weights = [None, None]
    inputs = [t if t is None else t.detach().requires_grad_() for t in (q, k, *weights, cos, sin)]
    wanted = [t for t in inputs if t is not None]
    mine = qk_norm_rope(*inputs, eps=1e-3, interleaved=interleaved)
    true = plain(*inputs, eps=1e-3, interleaved=interleaved)
    torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-5)
    upstream = tuple(torch.randn_like(t) for t in true)
    torch.testing.assert_close(
        torch.autograd.grad(mine, wanted, upstream),
        torch.autograd.grad(true, wanted, upstream),
        rtol=1e-4,
        atol=1e-4,
    )


def test_many_tokens_for_each_program() -> None:
    """More work than programs: every program walks over several blocks, and sums are in a fixed order."""
    inputs = [t.detach().requires_grad_() for t in _inputs(1, 3, 2, 1200, 8, 8)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    upstream = tuple(torch.randn_like(t) for t in plain(*inputs))
    runs = [torch.autograd.grad(qk_norm_rope(*inputs), inputs[:4], upstream) for _ in range(2)]
    true = torch.autograd.grad(plain(*wide), wide[:4], tuple(t.double() for t in upstream))
    for first, second, right in zip(*runs, true):
        assert torch.equal(first, second)
        torch.testing.assert_close(first.double(), right, rtol=1e-4, atol=1e-4)


def test_one_launch_each_way(monkeypatch) -> None:
    from kpt_plugin_triton import qk_norm_rope as module

    seen = []
    for name in ("_forward", "_backward", "_weight_sums"):
        launch = getattr(module, name)

        def watched(*call, launch=launch, name=name):
            seen.append((name, call[1]))
            return launch(*call)

        monkeypatch.setattr(module, name, watched)
    monkeypatch.setattr(module, "_remembered_plan", module._plan)
    q, k, *rest = (t.requires_grad_() for t in _inputs())
    out = qk_norm_rope(q, k, *rest)
    assert [name for name, _ in seen] == ["_forward"]
    assert seen[0][1][0].data_ptr() == q.data_ptr(), "a transposed view is used without a copy"
    torch.autograd.grad(out, (q, k), tuple(map(torch.ones_like, out)))
    assert [name for name, _ in seen] == ["_forward", "_backward", "_weight_sums"]


def test_gradients_by_differences() -> None:
    inputs = tuple(t.detach().requires_grad_() for t in _inputs(1, 2, 1, 3, 6, 4, dtype=torch.float64))
    assert gradcheck(lambda *a: qk_norm_rope(*a, eps=1e-2, offset=0.5), inputs)


@pytest.mark.parametrize("weighed", (False, True))
def test_compiled(weighed: bool) -> None:
    inputs = [t.requires_grad_() for t in _inputs()]
    if not weighed:
        inputs[2] = inputs[3] = None
    wanted = [t for t in inputs if t is not None]
    compiled = torch.compile(qk_norm_rope, fullgraph=True, backend="aot_eager")
    mine, true = compiled(*inputs), qk_norm_rope(*inputs)
    torch.testing.assert_close(mine, true, rtol=0, atol=0)
    assert [t.stride() for t in mine] == [t.stride() for t in true]
    upstream = tuple(torch.randn_like(t) for t in true)
    torch.testing.assert_close(
        torch.autograd.grad(mine, wanted, upstream), torch.autograd.grad(true, wanted, upstream)
    )


def test_nothing_in_nothing_out() -> None:
    inputs = [t.requires_grad_() for t in _inputs(sequence=0)]
    out = qk_norm_rope(*inputs)
    assert [t.shape for t in out] == [inputs[0].shape, inputs[1].shape]
    grads = torch.autograd.grad(out, inputs[2:4], out)
    assert all(not grad.any() for grad in grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 5, 16, dtype=torch.int8)}, "q is int8"),
        ({"k": torch.zeros(2, 2, 5, 8)}, "k is of shape"),
        ({"q_weight": torch.zeros(8)}, r"q_weight is of shape \(8,\); supported: shape \(16,\)"),
        ({"k_weight": torch.zeros(16, dtype=torch.int32)}, "k_weight is int32"),
        ({"cos": torch.zeros(3, 5, 16)}, "cos is of shape"),
    ],
)
def test_bad_arguments_are_named(change, message: str) -> None:
    arguments = dict(zip(NAMES, _inputs()))
    arguments.update({name: value.to(DEVICE) for name, value in change.items()})
    with pytest.raises(KernelInputError, match=f"^qk_norm_rope: {message}"):
        qk_norm_rope(**arguments)
