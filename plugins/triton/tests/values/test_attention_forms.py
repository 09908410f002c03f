"""Every form of attention against fp64, values and gradients: masks, windows, groups, layouts, sizes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from attention_cases import DEVICE, compare, heads, randn, with_options
from hypothesis import given, settings
from hypothesis import strategies as st

from kpt_plugin_triton.attention import attention
from kpt_plugin_triton.block_sparse import attention_block_sparse
from kpt_plugin_triton.launch import INTERPRETED
from kpt_plugin_triton.references import attention as plain
from kpt_plugin_triton.varlen import attention_varlen


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    """Several blocks of queries and keys in the few rows that the interpreter has time for."""
    if INTERPRETED:
        with_options(monkeypatch, SPLIT=1, DESCRIPTORS=0)


def flags(*shape: int, seed: int = 0) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5).to(DEVICE)


HOWS = {
    "plain": {},
    "causal": {"is_causal": True},
    "its own key alone": {"window": 1},
    "window": {"window": 18},
    "window wider than all": {"window": 1 << 40},
    "soft cap": {"softcap": 2.0, "is_causal": True, "scale": 0.4},
    "sinks in a window": {"sinks": 4, "window": 9},
}


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_what_position_and_scores_decide(how) -> None:
    compare(*heads(head_v=24), **how)


@pytest.mark.parametrize("dtype", (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16))
def test_half_precision(dtype) -> None:
    compare(*heads(dtype=dtype), is_causal=True, sinks=5)
    compare(*heads(dtype=dtype), mask=randn(37, 37, seed=7, dtype=dtype), softcap=3.0)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter would take hours")
@pytest.mark.parametrize("head", [64, 128])
@pytest.mark.parametrize("how", [{}, {"is_causal": True}, {"window": 300}], ids=["plain", "causal", "window"])
def test_many_blocks_with_tuned_options(head: int, how) -> None:
    """Races in pipelined loops show where a program walks over many blocks of full size."""
    q, k, v = (randn(1, heads, 2048, head, seed=n, dtype=torch.bfloat16) for n, heads in enumerate((4, 2, 2)))
    compare(q, k, v, **how)


def lowest() -> torch.Tensor:
    """A mask as transformers makes it: 0, or the lowest number; -inf here and there; a row all -inf."""
    mask = torch.where(flags(1, 1, 37, 37, seed=1), 0.0, torch.finfo(torch.float32).min)
    mask[..., 0] = 0.0
    mask[..., 9, :] = -math.inf
    mask[..., 11, 3:8] = -math.inf
    return mask


MASKS = {
    "bool": lambda: flags(1, 1, 37, 37),
    "bool by head": lambda: flags(1, 2, 37, 37),
    "padding": lambda: flags(37),
    "padding without a key": lambda: torch.zeros(1, 1, 1, 37, dtype=torch.bool, device=DEVICE),
    "rows without keys": lambda: flags(37, 1),
    "added": lambda: randn(2, 37, 37),
    "added by key": lambda: randn(1, 37),
    "lowest": lowest,
}


@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
def test_masks(make) -> None:
    compare(*heads(), mask=make(), is_causal=make is MASKS["bool"])


def test_a_mask_is_read_where_it_lies() -> None:
    """Transposed, and broadcast by strides of 0; nothing of its full size is made."""
    compare(*heads(), mask=randn(37, 37).t())
    compare(*heads(queries=2, keys=2), mask=flags(1, 1, 1, 37).expand(1, 2, 37, 37), sinks=2)


@pytest.mark.parametrize(
    ("q_len", "k_len"), [(50, 7), (7, 50), (1, 1), (17, 16)], ids=lambda length: str(length)
)
def test_lengths_that_differ(q_len: int, k_len: int) -> None:
    compare(*heads(q_len=q_len, k_len=k_len), is_causal=True)


@pytest.mark.parametrize(("head", "head_v"), [(1, 1), (20, 20), (16, 40), (40, 7), (256, 256)])
def test_head_sizes(head: int, head_v: int) -> None:
    compare(*heads(q_len=9, k_len=20, head=head, head_v=head_v))


@pytest.mark.parametrize(("queries", "keys"), [(6, 2), (3, 3), (4, 1)])
def test_groups(queries: int, keys: int) -> None:
    compare(*heads(2, queries, keys, q_len=5, k_len=18), window=4)


def test_strides() -> None:
    """Features apart, heads inside of rows, rows repeated, parts of one projection; results follow q."""
    q, k, v = heads(queries=2, keys=2, q_len=9, k_len=9)
    compare(q.transpose(2, 3).contiguous().transpose(2, 3), k, v)
    compare(q, k[:, :1].expand(1, 2, 9, 16), v[:, :, :1].expand(1, 2, 9, 16))
    joint = randn(1, 9, 2, 48).transpose(1, 2)
    out = compare(*joint.split(16, dim=-1), is_causal=True)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"q_len": 0}, {"k_len": 0}, {"q_len": 0, "k_len": 0}, {"queries": 0}], ids=str
)
def test_nothing_in_zeros_out(sizes) -> None:
    q, k, v = (x.detach().requires_grad_() for x in heads(**sizes))
    sinks = randn(q.shape[1]).requires_grad_()
    out = attention(q, k, v, sinks=sinks)
    assert out.shape == q.shape and not out.any()
    for leaf, grad in zip((q, k, v, sinks), torch.autograd.grad(out, (q, k, v, sinks), torch.ones_like(out))):
        assert grad.shape == leaf.shape and not grad.any()


def test_only_the_gradients_that_are_wanted(monkeypatch) -> None:
    from kpt_plugin_triton import attention_backward

    started = []
    for name in ("_keys", "_queries"):
        launch = getattr(attention_backward, name)
        monkeypatch.setattr(
            attention_backward, name, lambda *call, n=name, f=launch: (started.append(n), f(*call))
        )
    q, k, v = heads()
    attention(q.requires_grad_(), k, v).sum().backward()
    assert started == ["_queries"] and k.grad is None
    attention(q.detach(), k, v.requires_grad_()).sum().backward()
    assert started == ["_queries", "_keys"] and k.grad is None and v.grad is not None


PACKED = {"plain": {}, "causal": {"is_causal": True}, "window": {"window": 7, "sinks": 6}}


@pytest.mark.parametrize("how", PACKED.values(), ids=PACKED)
def test_packed_sequences(how) -> None:
    """Of different lengths, without queries, without keys, without either."""
    queries, keys = (5, 0, 20, 3, 0), (9, 4, 0, 33, 0)
    ends = [torch.tensor([0, *itertools.accumulate(x)], device=DEVICE) for x in (queries, keys)]
    q, k, v = randn(28, 2, 16), randn(46, 1, 16, seed=1), randn(46, 1, 24, seed=2)
    compare(
        q, k, v, lambda q, k, v, **o: attention_varlen(q, k, v, *ends, 20, 33, **o), _packed(*ends), **how
    )


def _packed(*ends: torch.Tensor):
    return lambda q, k, v, **how: plain.attention_varlen(q, k, v, *ends, 0, 0, **how)


SPARSE = {
    "rows of 16, columns of 32": ((1, 1, 3, 2), {}),
    "by batch and head": ((1, 2, 3, 3), {"is_causal": True}),
    "in a window": ((1, 2, 2, 3), {"window": 21, "softcap": 3.0}),
    "with sinks": ((1, 1, 3, 3), {"sinks": 8}),
}


@pytest.mark.parametrize(("shape", "how"), SPARSE.values(), ids=SPARSE)
def test_sparse_blocks(shape, how) -> None:
    blocks = flags(*shape, seed=3)
    blocks[..., 1, :] = False
    compare(
        *heads(q_len=45, k_len=40),
        lambda q, k, v, **o: attention_block_sparse(q, k, v, blocks, **o),
        lambda q, k, v, **o: plain.attention_block_sparse(q, k, v, blocks, **o),
        **how,
    )


@pytest.mark.parametrize("split", (0, 1))
@pytest.mark.parametrize("kind", ("causal", "window", "mask"))
def test_options_of_other_architectures(monkeypatch, split: int, kind: str) -> None:
    """One loop or three, descriptors as Hopper reads through, blocks that are no squares."""
    with_options(monkeypatch, BLOCK_M=16, BLOCK_N=32, SPLIT=split, DESCRIPTORS=1)
    how = {"causal": {"is_causal": True}, "window": {"window": 18}, "mask": {"mask": flags(37, 37)}}[kind]
    compare(*heads(queries=4, keys=2, head_v=32), **how)


@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 2),
    keys=st.integers(1, 2),
    group=st.integers(1, 2),
    q_len=st.integers(1, 20),
    k_len=st.integers(1, 20),
    head=st.integers(1, 20),
    causal=st.booleans(),
    window=st.sampled_from((None, 1, 6)),
    softcap=st.sampled_from((None, 2.0)),
)
def test_any_size(batch, keys, group, q_len, k_len, head, causal, window, softcap) -> None:
    given = heads(batch, keys * group, keys, q_len, k_len, head, head)
    compare(*given, is_causal=causal, window=window, softcap=softcap)
