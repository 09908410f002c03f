"""Attention of every kind under the conformance suite; what is traced, exported and refused."""

from __future__ import annotations

import pytest
import torch
from attention_cases import heads, randn, with_options
from triton_suite import InOneDtype, TritonSuite

import kpt_plugin_triton.plugin as plugin
from kpt_plugin_triton.attention import attention
from kpt_plugin_triton.block_sparse import attention_block_sparse
from kpt_plugin_triton.checks import KernelInputError
from kpt_plugin_triton.launch import INTERPRETED
from kpt_plugin_triton.references import attention as plain
from kpt_plugin_triton.varlen import attention_varlen

KERNELS = {spec.op: spec for spec in plugin.kpt_kernels() if spec.name == "triton"}
DEVICE = TritonSuite.device


@pytest.fixture(autouse=True)
def few_programs(monkeypatch) -> None:
    """The interpreter takes its time for each program, not for its size."""
    if INTERPRETED:
        with_options(monkeypatch, BLOCK_M=128, BLOCK_N=128, SPLIT=0, DESCRIPTORS=0)


class TestAttention(TritonSuite):
    """Grouped queries, causal, with soft cap and sinks."""

    kernel = KERNELS["attention"]
    rows = (1, 19)

    def arguments(self):
        q, k, v = randn(1, 2, 9, 16), randn(1, 1, 9, 16, seed=1), randn(1, 1, 9, 16, seed=2)
        return {"q": q, "k": k, "v": v, "is_causal": True, "softcap": 4.0, "sinks": randn(2, seed=3)}


class TestPackedAttention(InOneDtype):
    """Two sequences, the first of them empty where there is one row."""

    kernel = KERNELS["attention_varlen"]
    rows = (1, 19)

    def arguments(self):
        return {"q": randn(1, 2, 9, 16), "k": randn(1, 1, 9, 16, seed=1), "v": randn(1, 1, 9, 16, seed=2)}

    def run(self):
        return lambda **heads: _packed(attention_varlen, **heads)

    def reference(self):
        return lambda **heads: _packed(plain.attention_varlen, **heads)


class TestBlockSparseAttention(InOneDtype):
    """A checkerboard of blocks of 32, other ones for the second head of a group."""

    kernel = KERNELS["attention_block_sparse"]
    rows = (1, 33)
    most_rows = 40 if INTERPRETED else 70

    def arguments(self):
        q, k, v = randn(1, 2, 40, 16), randn(1, 1, 40, 16, seed=1), randn(1, 1, 40, 16, seed=2)
        return {"q": q, "k": k, "v": v}

    def run(self):
        return lambda q, k, v: attention_block_sparse(q, k, v, _checkerboard(q))

    def reference(self):
        return lambda q, k, v: plain.attention_block_sparse(q, k, v, _checkerboard(q))


def _packed(function, q, k, v):
    """[B, H, S, D] as the rows of two sequences."""
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    # 0, a third and all of the rows, made on the device: a captured graph may not copy from the host
    thirds = torch.arange(3, device=q.device, dtype=torch.int32)
    ends = (thirds + thirds // 2) * len(q) // 3
    return function(q, k, v, ends, ends, len(q), len(q), is_causal=True)


def _checkerboard(q: torch.Tensor) -> torch.Tensor:
    blocks = torch.arange(-(-q.shape[2] // 32), device=q.device)
    heads = torch.arange(q.shape[1], device=q.device)
    return ((blocks[:, None] + blocks + heads[:, None, None]) % 2 == 0)[None]


@pytest.mark.parametrize("how", [{"is_causal": True}, {"window": 5, "softcap": 3.0}])
def test_traced_whole_with_gradients(how) -> None:
    """fullgraph, forward and backward; what the compiler sees gives what eager gives."""
    given = [value.detach().requires_grad_() for value in (*heads(head_v=24), randn(2, seed=5))]

    def step(q, k, v, sinks):
        return attention(q * 2, k, v, sinks=sinks, **how).sin().sum()

    eager = torch.autograd.grad(step(*given), given)
    traced = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*given), given)
    for one, other in zip(eager, traced):
        torch.testing.assert_close(one, other)


def test_packed_and_sparse_are_traced_too() -> None:
    q, k, v = (x.detach().requires_grad_() for x in heads())

    def step(q, k, v):
        blocks = attention_block_sparse(q, k, v, _checkerboard(q))
        return blocks.sum() + _packed(attention_varlen, q, k, v).sin().sum()

    eager = torch.autograd.grad(step(q, k, v), (q, k, v))
    traced = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v)
    for one, other in zip(eager, torch.autograd.grad(traced, (q, k, v))):
        torch.testing.assert_close(one, other)


def test_what_the_compiler_is_told_is_what_comes() -> None:
    """Strides of results in the layouts that projections, caches and slices have."""
    from kpt_plugin_triton.attention import backward_op, forward_op

    rest = (None, None, None, None, 0, 0, None, True, None, 0.25, None)
    for layout in ((0, 2, 1, 3), (0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 2, 0)):
        sizes = [(1, 2, 9, 16)[axis] for axis in layout]
        back = [layout.index(axis) for axis in range(4)]
        q, k, v, dout = (randn(*sizes, seed=n).permute(back) for n in range(4))
        made = forward_op(q, k, v, *rest)
        grads = backward_op(dout, q, k, v, *made, *rest)
        meta = [x.to("meta") for x in (q, k, v)]
        told = forward_op(*meta, *rest)
        told_grads = backward_op(dout.to("meta"), *meta, *told, *rest)
        assert [(x.shape, x.stride()) for x in (*made, *grads)] == [
            (x.shape, x.stride()) for x in (*told, *told_grads)
        ]


def test_exported() -> None:
    class Block(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, is_causal=True)

    given = heads()
    program = torch.export.export(Block(), given)
    assert "kpt_triton.attention_forward" in program.graph_module.code
    torch.testing.assert_close(program.module()(*given), Block()(*given))


def test_a_second_derivative_is_refused_by_name() -> None:
    q, k, v = heads()
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(attention(q.requires_grad_(), k, v).sum(), q, create_graph=True)


Q, K, V = (1, 4, 6, 16), (1, 2, 6, 16), (1, 2, 6, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(Q, dtype=torch.int32)}, "q is int32; supported: bfloat16, float16, float32"),
        ({"q": torch.zeros(Q, dtype=torch.float64)}, "q is float64"),
        ({"k": torch.zeros(K, dtype=torch.float16)}, "k is float16; supported: float32"),
        ({"v": [1.0]}, "v is a list; supported: a tensor"),
        ({"q": torch.zeros(4, 6, 16)}, r"q is of 3 dimensions; supported: 4, \(B, H, S, D\)"),
        ({"q": torch.zeros(1, 3, 6, 16)}, "q is of 3 heads; supported: a multiple of the 2 heads of k"),
        ({"k": torch.zeros(1, 2, 6, 8)}, r"k is of shape \(1, 2, 6, 8\); supported: 16 features"),
        ({"k": torch.zeros(2, 2, 6, 16)}, "k is of shape .*supported: batch size 1"),
        ({"v": torch.zeros(1, 2, 5, 16)}, r"v is of shape .*supported: shape \(1, 2, 6, 16\)"),
        ({"q": torch.zeros(1, 4, 6, 264), "k": torch.zeros(1, 2, 6, 264)}, "q is of 264 features.*1 to 256"),
        ({"v": torch.zeros(1, 2, 6, 0)}, "v is of 0 features; supported: 1 to 256"),
        ({"mask": torch.zeros(6, 5)}, r"mask is of shape \(6, 5\).*broadcasts to \(1, 4, 6, 6\)"),
        ({"mask": torch.zeros(6, 6, dtype=torch.int64)}, "mask is int64; supported: bool, bfloat16"),
        ({"mask": torch.zeros(6, 6, requires_grad=True)}, "mask is in need of a gradient"),
        ({"sinks": torch.zeros(3)}, r"sinks is of shape \(3,\); supported: shape \(4,\)"),
        ({"scale": -1.0}, "scale is -1.0; supported: a positive number"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"softcap": 0.0}, "softcap is 0.0; supported: a positive number, or None"),
        ({"window": 0}, "window is 0; supported: a number of keys from 1 on, or None"),
    ],
)
def test_what_is_refused_is_named(change, message: str) -> None:
    given = {"q": torch.zeros(Q), "k": torch.zeros(K), "v": torch.zeros(V), **change}
    given = {
        n: x.detach().to(DEVICE).requires_grad_(x.requires_grad) if _is_tensor(x) else x
        for n, x in given.items()
    }
    with pytest.raises(KernelInputError, match=f"^attention: {message}"):
        attention(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": torch.tensor([0.0, 6.0])}, "cu_seqlens_q is float32; supported: int32, int64"),
        ({"cu_seqlens_k": torch.tensor([0, 3, 6])}, r"cu_seqlens_k is of shape \(3,\); supported: \(2,\)"),
        ({"q": torch.zeros(1, 6, 4, 16)}, r"q is of 4 dimensions; supported: 3, \(T, H, D\)"),
        ({"max_q": 0}, "max_q is 0; supported: at least the longest"),
    ],
)
def test_what_packed_attention_refuses(change, message: str) -> None:
    ends = torch.tensor([0, 6], device=DEVICE)
    given = {"q": torch.zeros(6, 4, 16), "k": torch.zeros(6, 2, 16), "v": torch.zeros(6, 2, 16)}
    given |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_q": 6, "max_k": 6, **change}
    with pytest.raises(KernelInputError, match=f"^attention_varlen: {message}"):
        attention_varlen(**{n: x.to(DEVICE) if _is_tensor(x) else x for n, x in given.items()})


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (torch.ones(1, 1, 1, 1), "block_mask is float32; supported: bool"),
        (torch.ones(1, 1, dtype=torch.bool), "block_mask is of 2 dimensions"),
        (torch.ones(1, 3, 3, 3, dtype=torch.bool), "block_mask is of shape .*heads 1 or 2"),
        (torch.ones(1, 1, 4, 3, dtype=torch.bool), "block_mask is of 4 blocks for 40 positions"),
    ],
)
def test_what_block_sparse_attention_refuses(blocks, message: str) -> None:
    with pytest.raises(KernelInputError, match=f"^attention_block_sparse: {message}"):
        attention_block_sparse(*heads(q_len=40, k_len=40), blocks.to(DEVICE))


def test_a_cpu_tensor_is_refused_outside_of_the_interpreter(monkeypatch) -> None:
    from kpt_plugin_triton import checks

    monkeypatch.setattr(checks, "INTERPRETED", False)
    with pytest.raises(KernelInputError, match="q is on device cpu; supported: a GPU tensor"):
        attention(*(torch.zeros(shape) for shape in (Q, K, V)))


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)
