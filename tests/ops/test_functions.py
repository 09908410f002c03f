"""Functions and named calls inside a forward: found, proved, and rebound for one instance only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from called_functions import Attention, X, sites
from kpt import ops
from recognised import Call


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    one, other = x.chunk(2, dim=-1)
    return torch.cat((-other, one), dim=-1)


def turn_both(q: Any, k: Any, cos: Any, sin: Any, heads_at: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos.unsqueeze(heads_at), sin.unsqueeze(heads_at)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def turn_pairs(q: Any, k: Any, sin: Any, cos: Any) -> tuple[torch.Tensor, torch.Tensor]:
    def turn(x: torch.Tensor) -> torch.Tensor:
        c, s = cos[:, :, None], sin[:, :, None]
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((even * c - odd * s, odd * c + even * s), dim=-1).flatten(-2)

    return turn(q), turn(k)


def turn_wrong(q: Any, k: Any, cos: Any, sin: Any) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos - rotate_half(k) * sin


class Rotary(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v, table = self.parts(x)
        q, k = turn_both(q, k, table.cos(), table.sin())
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class RotaryPairs(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v, table = self.parts(x, at=2)
        q, k = turn_pairs(q, k, table[..., :4].sin(), table[..., :4].cos())
        return torch.softmax(q.transpose(1, 2) @ k.transpose(1, 2).transpose(-1, -2), dim=-1)


class RotaryWrong(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v, table = self.parts(x)
        q, k = turn_wrong(q, k, table.cos(), table.sin())
        return nn.functional.softmax(q @ k.transpose(-1, -2), -1, dtype=torch.float32)


def test_rope_is_found_in_both_layouts_and_both_pairings() -> None:
    half = sites(Rotary(), X)["turn_both"]
    assert half.op == "rope" and half.kind == "function" and half.binding.arguments["interleaved"] == "False"
    pairs = sites(RotaryPairs(), X)["turn_pairs"]
    assert pairs.op == "rope" and pairs.binding.arguments["interleaved"] == "True"
    assert "transpose" in pairs.binding.arguments["q"]


def test_a_rope_with_a_wrong_sign_is_left_alone() -> None:
    found = ops.recognise(RotaryWrong(), [Call((X,))])
    assert not found.of("rope")
    assert any(where == ":turn_wrong" and "something else" in text for where, text in found.left_alone)


def test_named_calls_are_found_by_the_name_that_the_code_uses() -> None:
    attention = sites(Rotary(), X)["F.scaled_dot_product_attention"]
    assert attention.op == "attention" and attention.kind == "call"
    assert sites(RotaryPairs(), X)["torch.softmax"].op == "softmax"
    assert sites(RotaryWrong(), X)["nn.functional.softmax"].op == "softmax"


@pytest.mark.parametrize("cls", [Rotary, RotaryPairs, RotaryWrong])
def test_each_site_runs_the_reference_in_one_instance_only(cls: type[Attention]) -> None:
    module, other = cls(), cls()
    other.load_state_dict(module.state_dict())
    expected = module(X)
    served: list[str] = []

    def counting(op: str) -> Any:
        def kernel(*args: Any, **kwargs: Any) -> Any:
            served.append(op)
            return ops.reference(op)(*args, **kwargs)

        return kernel

    found = sites(module, X)
    undos = [ops.install(module, site, counting(site.op)) for site in found.values()]
    torch.testing.assert_close(module(X), expected)
    assert sorted(served) == sorted(site.op for site in found.values())
    served.clear()
    assert torch.equal(other(X), expected) and not served
    for undo in reversed(undos):
        undo()
    assert "forward" not in vars(module) and torch.equal(module(X), expected) and not served


def test_a_rebound_forward_compiles_in_one_graph() -> None:
    module = Rotary().eval()
    expected = module(X)
    for site in sites(module, X).values():
        ops.install(module, site, ops.reference(site.op))
    compiled = torch.compile(lambda x: module(x), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), expected)


def test_a_call_outside_the_proof_runs_the_original_function() -> None:
    class Placed(Attention):
        at = 1

        def forward(self, x: torch.Tensor, at: int = 1) -> torch.Tensor:
            q, k, _, table = self.parts(x, at)
            return turn_both(q, k, table.cos(), table.sin(), at)[0]

    module = Placed()
    site = sites(module, X)["turn_both"]
    expected = module(X, 2)
    ops.install(module, site, lambda **_: pytest.fail("the kernel served a call that was not proved"))
    assert torch.equal(module(X, 2), expected)
