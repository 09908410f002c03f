"""Attention written out: the same values as torch's fused one, and only where it pays."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from observing import observe

from kpt.compiling import CompiledForward
from kpt_plugin_cpu.attention import ShortAttention, attention_as_products
from kpt_plugin_cpu.inductor import declared_bounds

SDPA = torch.nn.functional.scaled_dot_product_attention


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("groups", [1, 2])
def test_values(causal, mask, groups):
    if causal and mask != "none":
        pytest.skip("torch refuses both")
    torch.manual_seed(0)
    query = torch.randn(2, 4, 7, 8)
    key, value = torch.randn(2, 4 // groups, 7, 8), torch.randn(2, 4 // groups, 7, 8)
    given = {"none": None, "bool": torch.rand(2, 1, 7, 7) > 0.4, "float": torch.randn(2, 1, 7, 7)}[mask]
    options = {"attn_mask": given, "is_causal": causal, "scale": 0.3, "enable_gqa": groups > 1}
    torch.testing.assert_close(
        attention_as_products(query, key, value, **options), SDPA(query, key, value, **options)
    )


def test_a_row_without_keys_is_zero_as_in_torch():
    query = torch.randn(1, 2, 3, 8)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    mask[0, 0, 1] = False
    got, expected = (attend(query, query, query, attn_mask=mask) for attend in (attention_as_products, SDPA))
    torch.testing.assert_close(got, expected)
    assert not got[0, :, 1].any()


class Attends(torch.nn.Module):
    def forward(self, x):
        return SDPA(x, x, x) + 0


@pytest.mark.parametrize(
    ("dtype", "keys", "exchanged"),
    [(torch.bfloat16, 16, 1), (torch.float32, 16, 0), (torch.bfloat16, 2048, 0)],
)
@torch.no_grad()
def test_only_short_bf16_attention_is_exchanged(dtype, keys, exchanged):
    change = ShortAttention()
    x = torch.randn(1, 2, keys, 8).to(dtype)
    forward = CompiledForward(Attends().forward, backend="aot_eager", graph_pass=change)
    torch.testing.assert_close(forward(x).float(), SDPA(x, x, x).float(), atol=2e-2, rtol=2e-2)
    assert change.exchanged == exchanged


class AttendsTwice(torch.nn.Module):
    """Keys are as many as queries and ``more`` of them."""

    def forward(self, x, more):
        keys = torch.cat([x, more], 2)
        return SDPA(x, keys, keys) + 0


@pytest.mark.parametrize(
    ("bounds", "exchanged"), [({}, 0), ({2: 500}, 1), ({2: 600}, 0), ({2: 4096}, 0), ({1: 16}, 0)]
)
@torch.no_grad()
def test_dynamic_lengths_count_by_their_bounds(bounds, exchanged):
    """Twice the bound is what keys can number; the example's handful says nothing."""
    change = ShortAttention(bounds)
    x, more = torch.randn(1, 2, 6, 8).bfloat16(), torch.randn(1, 2, 5, 8).bfloat16()
    dims = {"x": {2: "sequence"}, "more": {2: "past"}}
    forward = CompiledForward(
        AttendsTwice().forward, backend="aot_eager", graph_pass=change, dynamic_dims=dims
    )
    for size in (5, 9):
        expected = AttendsTwice()(x, more)
        torch.testing.assert_close(forward(x, more), expected, atol=2e-2, rtol=2e-2)
        more = torch.randn(1, 2, size, 8).bfloat16()
    assert change.exchanged == exchanged
    assert forward.graphs == 1


def test_only_declared_bounds_bind_an_axis():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    x = torch.randn(2, 6, 8)
    for name, bounds in (("sequence", {}), (("sequence", 1, 512), {"1": 512})):
        observation = observe(model, x, dynamic_shapes={"input": {1: name}})
        assert declared_bounds(observation) == bounds
