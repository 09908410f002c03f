"""Attention of few queries to many keys, split over the keys, against fp64."""

from __future__ import annotations

import pytest
import torch
from attention_cases import DEVICE, compare, heads, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_suite import TritonSuite

import kpt_plugin_triton.plugin as plugin
from kpt.ops import reference
from kpt_plugin_triton import attention, decode
from kpt_plugin_triton.checks import KernelInputError
from kpt_plugin_triton.decode import decode_attention
from kpt_plugin_triton.launch import INTERPRETED
from kpt_plugin_triton.references import attention as plain


@pytest.fixture(autouse=True)
def few_keys(monkeypatch) -> None:
    """Splits of 16 keys from 16 keys on, for the interpreter."""
    if INTERPRETED:
        options = {"BLOCK_N": 16, "PROGRAMS": 1, "num_warps": 4, "num_stages": 1}
        monkeypatch.setattr(decode, "split_options", lambda *sizes: options)
        monkeypatch.setattr(decode, "FEWEST_KEYS", 16)


class TestDecodeAttention(TritonSuite):
    """One query for each of the group's heads; the cache of the second sequence is half full."""

    kernel = next(spec for spec in plugin.kpt_kernels() if spec.op == "decode_attention")
    rows = (1, 33)
    most_rows = 9 if INTERPRETED else 60

    def arguments(self):
        q, k, v = randn(2, 2, 1, 16), randn(2, 1, 40, 16, seed=1), randn(2, 1, 40, 16, seed=2)
        return {"q": q, "k": k, "v": v, "softcap": 4.0, "sinks": randn(2, seed=3)}

    def run(self):
        return lambda **given: decode_attention(lengths=_half(given["k"]), **given)

    def reference(self):
        return lambda **given: plain.decode_attention(lengths=_half(given["k"]), **given)

    def dtypes(self):
        return [torch.float32] if INTERPRETED else super().dtypes()


def _half(k: torch.Tensor) -> torch.Tensor:
    lengths = torch.full((len(k),), k.shape[2], device=k.device)
    lengths[1:] //= 2
    return lengths


def _close(mine: torch.Tensor, true: torch.Tensor) -> None:
    torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ({}, {"softcap": 2.0, "scale": 0.3}, {"sinks": 3}), ids=str)
def test_attention_over_many_keys_splits_them(monkeypatch, how) -> None:
    """The same op with few queries; gradients come from its statistics."""
    started = []
    launch = decode._split
    monkeypatch.setattr(decode, "_split", lambda *call: (started.append(call[0]), launch(*call)))
    keys = 75 if INTERPRETED else 4001
    compare(*heads(1, 4, 2, q_len=3, k_len=keys, head_v=24), **how)
    assert len(started) == 2 and started[0][0] > 1, "the keys were not split"


@pytest.mark.parametrize("kind", ("bool", "added", "padding"))
def test_masks(kind: str) -> None:
    keys = 75 if INTERPRETED else 4001
    flags = randn(1, 2, 3, keys, seed=4) > 0
    flags[:, 0, 1] = False
    masks = {"bool": flags, "added": randn(2, 3, keys, seed=5), "padding": flags[:, 1:, :1]}
    compare(*heads(1, 2, 1, q_len=3, k_len=keys), mask=masks[kind])


@pytest.mark.parametrize("queries", (1, 3))
def test_a_cache_that_is_filled_in_part(queries: int) -> None:
    """Full, one entry, fewer entries than queries, empty; what lies behind the filled part is NaN."""
    q, k, v = heads(4, 4, 2, q_len=queries, k_len=40)
    lengths = torch.tensor([40, 1, queries - 1, 0], device=DEVICE)
    for one, (keys, values) in enumerate(zip(k, v)):
        keys[:, lengths[one] :] = values[:, lengths[one] :] = torch.nan
    out = decode_attention(q, k, v, lengths)
    true = plain.decode_attention(q.double(), k.nan_to_num().double(), v.nan_to_num().double(), lengths)
    _close(out, true)
    assert not out[3].any()
    _close(decode_attention(q, k, v, lengths.int()), true)


def test_without_lengths_every_query_sees_every_key() -> None:
    q, k, v = heads(1, 4, 2, q_len=2, k_len=50, head_v=40)
    _close(decode_attention(q, k, v), reference("attention")(q.double(), k.double(), v.double()))


def test_a_longer_cache_has_its_strides() -> None:
    """Keys of a static cache [B, Hkv, longest, D], and one that is laid out [B, longest, Hkv, D]."""
    q, k, v = heads(2, 2, 1, q_len=1, k_len=60)
    true = reference("attention")(q.double(), k[:, :, :33].double(), v[:, :, :33].double())
    _close(decode_attention(q, k[:, :, :33], v[:, :, :33]), true)
    _close(decode_attention(q, k.contiguous()[:, :, :33], v.contiguous()[:, :, :33]), true)


@pytest.mark.parametrize(
    ("blocks", "pairs", "at_once", "parts"),
    [
        (256, 8, 132, 16),
        (256, 32, 132, 4),
        (64, 128, 132, 1),
        (256, 140, 132, 8),
        (3, 1, 264, 3),
        (1, 500, 4, 1),
    ],
)
def test_no_part_waits_for_room_beside_the_others(blocks: int, pairs: int, at_once: int, parts: int) -> None:
    """17 parts of 8 heads are four programs more than 132, and would take twice as long as 16 parts."""
    assert decode.parts_of(blocks, pairs, at_once) == parts


@settings(max_examples=10, deadline=None)
@given(
    batch=st.integers(1, 2),
    keys=st.integers(1, 2),
    group=st.integers(1, 5),
    queries=st.integers(1, 4),
    length=st.integers(1, 60),
    head=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_any_size(batch, keys, group, queries, length, head, seed) -> None:
    q, k, v = heads(batch, keys * group, keys, queries, length, head, head)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, length + 1, (batch,), generator=generator).to(DEVICE)
    _close(
        decode_attention(q, k, v, lengths),
        plain.decode_attention(q.double(), k.double(), v.double(), lengths),
    )


def test_traced_whole() -> None:
    """The lengths stay data: one graph serves them all."""
    q, k, v = heads(2, 2, 1, q_len=1, k_len=40)
    compiled = torch.compile(decode_attention, fullgraph=True, backend="aot_eager")
    for filled in (40, 7):
        lengths = torch.full((2,), filled, device=DEVICE)
        torch.testing.assert_close(compiled(q, k, v, lengths), decode_attention(q, k, v, lengths))


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"q_len": 0}, {"k_len": 0}], ids=str)
def test_nothing_in_zeros_out(sizes) -> None:
    q, k, v = heads(**{"q_len": 1, **sizes})
    out = decode_attention(q, k, v)
    assert out.shape == q.shape and not out.any()


def test_long_rows_are_left_to_the_ordinary_kernel(monkeypatch) -> None:
    monkeypatch.setattr(decode, "_split", None)
    for queries, how in ((17, {}), (3, {"is_causal": True}), (3, {"window": 9})):
        attention.attention(*heads(q_len=queries, k_len=40), **how)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 4, 1, 16, dtype=torch.float64)}, "q is float64; supported: bfloat16"),
        ({"q": torch.zeros(1, 4, 1, 16, requires_grad=True)}, "q, k, v or sinks is in need of a gradient"),
        ({"q": torch.zeros(1, 4, 65, 16)}, "q is of 130 rows for each key head; supported: at most 128"),
        ({"q": torch.zeros(1, 4, 1, 8)}, r"k is of shape \(1, 2, 5, 16\); supported: 8 features"),
        ({"v": torch.zeros(1, 2, 4, 16)}, "v is of shape"),
        ({"lengths": torch.zeros(1)}, "lengths is float32; supported: int32, int64"),
        (
            {"lengths": torch.zeros(2, dtype=torch.int64)},
            r"lengths is of shape \(2,\); supported: shape \(1,\)",
        ),
        ({"sinks": torch.zeros(5)}, r"sinks is of shape \(5,\); supported: shape \(4,\)"),
        ({"scale": 0.0}, "scale is 0.0; supported: a positive number"),
    ],
)
def test_what_is_refused_is_named(change, message: str) -> None:
    cache = {"k": torch.zeros(1, 2, 5, 16), "v": torch.zeros(1, 2, 5, 16)}
    given = {"q": torch.zeros(1, 4, 1, 16), **cache, **change}
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            given[name] = value.detach().to(DEVICE).requires_grad_(value.requires_grad)
    with pytest.raises(KernelInputError, match=f"^decode_attention: {message}"):
        decode_attention(**given)
