"""Attributes of what a model returns, where the compiler that traces it cannot list them (torch 2.11)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from kpt_plugin_cpu import attributes
from kpt_plugin_cpu.casting import cast_calls


class Base:
    def __init__(self, state: torch.Tensor) -> None:
        self.keep(state)

    def keep(self, state: torch.Tensor) -> None:
        self.state = state


@dataclass(frozen=True)
class Named:
    state: torch.Tensor
    name: str = "frozen"


class Cache(Base):
    """Stores in a method of its base's, in a property, and where no call comes."""

    def __init__(self, state: torch.Tensor) -> None:
        super().__init__(state)
        self.layers, self.length = [Named(state)], 4
        self.held = {0: [state]}
        self.size = 3
        if state.dim() > 9:
            self.never = state

    @property
    def size(self) -> int:
        return self._size

    @size.setter
    def size(self, size: int) -> None:
        self._size = size


class Returns(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(8, 8), kind

    def forward(self, x: torch.Tensor) -> Any:
        return self.kind(self.linear(x))


class Computed:
    def __init__(self, state: torch.Tensor) -> None:
        for name in ("key", "value"):
            setattr(self, name, state)


def narrowed(kind: Any) -> nn.Module:
    """A model in bf16 that takes and returns fp32."""
    model = Returns(kind).eval().bfloat16()
    cast_calls(model, torch.bfloat16)
    return model


@pytest.mark.parametrize("listed", [False, True])
@torch.no_grad()
def test_a_copy_in_traced_code_has_every_attribute(monkeypatch, listed):
    if listed and not attributes._LISTED:
        pytest.skip("this torch cannot list them")
    monkeypatch.setattr(attributes, "_LISTED", listed)
    model, x = narrowed(Cache), torch.randn(2, 8)
    expected = model(x)
    found = torch.compile(model.forward, backend="eager", fullgraph=True)(x)
    assert type(found) is Cache and found.size == 3
    assert vars(found).keys() == vars(expected).keys() == {"state", "layers", "length", "held", "_size"}
    assert type(found.layers[0]) is Named and found.layers[0].name == "frozen"
    for state in (found.state, found.layers[0].state, found.held[0][0]):
        assert state.dtype is torch.float32
        torch.testing.assert_close(state, expected.state)


@torch.no_grad()
def test_a_class_that_computes_names_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(attributes, "_LISTED", False)
    model, x = narrowed(Computed), torch.randn(2, 8)
    assert model(x).key.dtype is torch.float32, "eager code lists them"
    with pytest.raises(Exception, match=r"Computed.__init__ sets attributes by names that it computes"):
        torch.compile(model.forward, backend="eager", fullgraph=True)(x)


@torch.no_grad()
def test_the_names_in_the_caches_of_transformers_are_known():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 2, "use_cache": True}
    llama = transformers.LlamaConfig(**sizes, intermediate_size=16, num_attention_heads=2)
    ids = torch.randint(0, 16, (2, 4))
    caches = [
        transformers.LlamaForCausalLM(llama).eval()(ids).past_key_values,
        transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).eval()(ids).cache_params,
    ]
    for cache in caches:
        for holder in (cache, *cache.layers):
            assert vars(holder) and vars(holder).keys() <= set(attributes._stored(type(holder)))
