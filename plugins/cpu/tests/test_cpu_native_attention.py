"""The attention in C++: its op's own meaning for every size, mask and stride, alone and in a plan."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from observing import Only

import kpt
from kpt import ops
from kpt.compiling import CompiledForward
from kpt.judge.calls import Call
from kpt.kernels import KernelBehaviour, supported
from kpt.ops.references.attention import attention as reference
from kpt.ops.sites import Site
from kpt.testing import KernelSuite
from kpt_plugin_cpu import inductor, native_attention, plugin
from kpt_plugin_cpu.native_attention import attention

pytestmark = pytest.mark.skipif(inductor.compiler() is None, reason="no C++ compiler was found")
SPEC = next(spec for spec in plugin.kpt_kernels() if spec.op == "attention")


class TestNativeAttention(KernelSuite):
    kernel = SPEC


DTYPES = [torch.float32, torch.bfloat16]


def heads(
    batch: int, count: int, rows: int, features: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """[batch, heads, rows, features] as a linear layer leaves it."""
    wide = torch.randn(batch, rows, count * features).to(dtype)
    return wide.view(batch, rows, count, features).transpose(1, 2)


def assert_right(q, k, v, **options):
    wide = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }
    true = reference(q.double(), k.double(), v.double(), **wide)
    same = {
        name: value.to(q.dtype) if name in wide and wide[name] is not value else value
        for name, value in options.items()
    }
    mine, eager = attention(q, k, v, **options), reference(q, k, v, **same)
    assert mine.dtype == q.dtype
    assert mine.shape == true.shape
    assert mine.transpose(1, 2).is_contiguous()
    error, usual = (float((y.double() - true).norm() / true.norm()) for y in (mine, eager))
    assert error <= 2 * usual + 1e-6


@pytest.fixture(autouse=True)
def fixed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 300), (5, 129), (64, 128), (65, 127), (197, 197)])
def test_every_number_of_rows(queries, keys, causal, dtype):
    q, k, v = (heads(2, 4, rows, 16, dtype) for rows in (queries, keys, keys))
    assert_right(q, k, v, is_causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [1, 7, 16, 40, 64, 80, 256])
@pytest.mark.parametrize("value_features", [3, 64])
def test_every_size_of_a_head(features, value_features, dtype):
    features += features % 2 if dtype is torch.bfloat16 else 0
    q, k = heads(1, 4, 70, features, dtype), heads(1, 2, 70, features, dtype)
    v = heads(1, 2, 70, value_features, dtype)
    assert_right(q, k, v, scale=0.3)


def masks(queries: int, keys: int) -> dict[str, torch.Tensor]:
    padding = torch.ones(2, 1, 1, keys, dtype=torch.bool)
    padding[1, ..., keys // 2 :] = False
    every = torch.rand(2, 4, queries, keys)
    return {
        "padding": padding,
        "padding of every query": padding.expand(2, 1, queries, keys).contiguous(),
        "flags": every > 0.4,
        "rows": torch.rand(queries, 1) > 0.4,
        "added": torch.randn(1, 4, queries, keys),
        "added to keys": torch.randn(2, 1, 1, keys),
        "added, strided": torch.randn(1, 4, keys, queries).transpose(-1, -2),
        "lowest": torch.where(every > 0.4, 0.0, torch.finfo(torch.float32).min),
    }


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(masks(1, 1)))
def test_every_mask(name, causal, dtype):
    q, k, v = heads(2, 4, 70, 16, dtype), heads(2, 2, 200, 16, dtype), heads(2, 2, 200, 16, dtype)
    assert_right(q, k, v, mask=masks(70, 200)[name], is_causal=causal)


def test_a_query_that_sees_no_key_gives_zeros():
    q, k = heads(1, 2, 3, 8), heads(1, 2, 200, 8)
    mask = torch.ones(1, 1, 3, 200, dtype=torch.bool)
    mask[0, 0, 1] = False
    mask[0, 0, 2, :150] = False  # the first block of keys holds none that it sees
    y = attention(q, k, k, mask=mask)
    assert not y[0, :, 1].any()
    torch.testing.assert_close(y, reference(q, k, k, mask=mask))


def test_scores_of_any_size_and_nan_where_the_reference_has_it():
    q, k, v = heads(1, 2, 20, 8), heads(1, 2, 150, 8), heads(1, 2, 150, 8)
    torch.testing.assert_close(attention(q * 1e4, k, v), reference(q * 1e4, k, v))
    q[0, 0, 3, 0] = torch.nan
    y = attention(q, k, v)
    assert torch.equal(y.isnan(), reference(q, k, v).isnan())


def test_features_that_are_not_innermost():
    q, k, v = (torch.randn(1, 2, 8, 20).transpose(-1, -2) for _ in range(3))
    assert_right(q, k, v)


def test_the_result_does_not_depend_on_the_number_of_threads():
    q, k, v = heads(2, 3, 150, 16), heads(2, 3, 150, 16), heads(2, 3, 150, 16)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(attention(q, k, v, is_causal=True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_nothing_to_attend_to():
    q, none = heads(1, 2, 3, 8), heads(1, 2, 0, 8)
    assert torch.equal(attention(q, none, none), torch.zeros(1, 2, 3, 8))
    assert attention(none, q, q).shape == (1, 2, 0, 8)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"window": 4}, ValueError, "window"),
        ({"softcap": 30.0}, ValueError, "softcap"),
        ({"q": torch.randn(1, 2, 3, 8).double()}, TypeError, "q is torch.float64"),
        ({"q": torch.randn(1, 2, 3, 8).bfloat16()}, TypeError, "one dtype"),
        ({name: torch.randn(1, 2, 3, 7).bfloat16() for name in "qkv"}, ValueError, "7 features"),
        ({"q": torch.randn(2, 3, 8)}, ValueError, "q has 3 dimensions"),
        ({"q": torch.randn(1, 3, 3, 8)}, ValueError, "3 heads"),
        ({"q": torch.randn(1, 2, 3, 9)}, ValueError, "do not fit"),
        ({"mask": torch.ones(3, 3, dtype=torch.long)}, TypeError, "mask is torch.int64"),
    ],
)
def test_bad_input_is_named(change, kind, message):
    given = {name: torch.randn(1, 2, 3, 8) for name in "qkv"}
    with pytest.raises(kind, match=message):
        attention(**{**given, **change})


def site(arguments=("q", "k", "v"), features=64, dtype="float32", mask="bool"):
    example = SimpleNamespace(
        shapes=dict.fromkeys("qkv", (1, 2, 3, features)), dtypes={**dict.fromkeys("qkv", dtype), "mask": mask}
    )
    return SimpleNamespace(
        binding=SimpleNamespace(arguments=dict.fromkeys(arguments)), examples=(example,), devices=("cpu",)
    )


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, None),
        ({"arguments": ("q", "k", "v", "sinks")}, "sinks"),
        ({"features": 512}, "512 features"),
        ({"dtype": "bfloat16"}, None),
        ({"dtype": "float16"}, "float16"),
        ({"features": 7}, "7 features"),
        ({"mask": "float64"}, "float64"),
    ],
)
def test_sites_that_it_refuses(given, reason):
    found = native_attention.supports(site(**given))
    assert found is None if reason is None else reason in found


def test_without_a_compiler_the_reason_is_given(monkeypatch):
    monkeypatch.setattr("kpt_plugin_cpu.native_attention.compiler", lambda: None)
    assert "C++ compiler" in native_attention.supports(site())


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(64, 192)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("wrapper", [False, True])
@torch.no_grad()
def test_inside_compiled_code(wrapper):
    layer = Attends().eval()

    def forward(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in layer.project(x).chunk(3, -1))
        return attention(q, k, v, mask).transpose(1, 2).flatten(2)

    compiled = CompiledForward(forward, inductor_config={"freezing": True, "cpp_wrapper": wrapper})
    x, mask = torch.randn(2, 30, 64), torch.rand(2, 1, 30, 30) > 0.3
    with torch.profiler.profile() as profile:
        found = compiled(x, mask)
    torch.testing.assert_close(found, layer(x, mask))
    assert compiled.graphs == 1
    assert any(event.key == "kpt_cpu::attention" for event in profile.key_averages())
    compiled.dispose()


@torch.no_grad()
def test_it_is_offered_and_judged_like_any_other_kernel():
    model = Attends().eval()
    calls = [(torch.randn(2, 150, 64), torch.rand(2, 1, 150, 150) > 0.3) for _ in range(3)]
    alone = [Only("attention/native")]
    optimised = kpt.optimize(model, calls, level="exact", plugins=alone, budget=60.0, cache=False)
    receipt = kpt.report(optimised)
    (entry,) = [e for e in (*receipt.accepted, *receipt.rejected) if e.name == "attention/native"]
    assert entry in receipt.accepted or entry.rule == "slower", entry
    x = calls[0]
    torch.testing.assert_close(optimised(*x), Attends.forward(model, *x))
    kpt.restore(optimised)


@torch.no_grad()
def test_it_serves_grouped_queries_where_a_compiler_sees_a_mask_that_the_examples_have_not():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=576, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=9, num_key_value_heads=3, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    call = Call((), {"input_ids": torch.randint(0, 64, (1, 40))})
    sites, reason = supported(SPEC, ops.recognise(model, [call]).sites, "inference")
    assert len(sites) == 2, reason
    expected = model(**call.kwargs).logits
    for compiler in (None, "eager"):
        behaviour = KernelBehaviour(SPEC, tuple(sites))
        undo = behaviour.apply(model, behaviour.propose(None, None)[0])
        forward = CompiledForward(model.forward, backend=compiler) if compiler else model
        with torch.profiler.profile() as profile:
            found = forward(**call.kwargs).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert behaviour.verify_applied(model)
        assert any(event.key == "kpt_cpu::attention" for event in profile.key_averages())
        undo()


def test_a_kernel_that_takes_no_masks_keeps_the_sites_without():
    spec = replace(SPEC, supports=f"{__name__}:takes_no_mask")
    bindings = [SimpleNamespace(arguments=dict.fromkeys(names)) for names in (("q",), ("q", "mask"))]
    without, masked = (
        Site("attention", "", "call", nn.Identity(), binding, dtypes=("float32",)) for binding in bindings
    )
    for given in (SPEC, spec):
        (kept,), reason = supported(given, [replace(without, others=(masked,))], "inference")
        assert reason is None and kept.binding is without.binding
        assert len(kept.others) == (given is SPEC)


def takes_no_mask(site: Site) -> str | None:
    return "it has a mask" if "mask" in site.binding.arguments else None
