"""Plans with copies of weights end where a tensor changes that a module holds in a list, table or object."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fingerprints import fast_calls, optimized
from planned import eager
from slow_models import DerivedScale, net, plugin

CASES: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[Any], Any]]] = {
    "list": (lambda w: [w], lambda held: held[0].mul_(2)),
    "tuple": (lambda w: (1, w), lambda held: held[1].add_(1)),
    "table": (lambda w: {"w": w}, lambda held: held.update(w=torch.zeros(3))),
    "nested": (lambda w: [{"a": (w,)}], lambda held: held[0]["a"][0].zero_()),
    "object": (lambda w: types.SimpleNamespace(w=w), lambda held: setattr(held, "w", torch.ones(3))),
    "emptied": (lambda w: [w], lambda held: held.clear()),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_change_is_noticed_on_the_next_call(kind: str):
    hold, change = CASES[kind]
    model, example = net(), torch.randn(32, 16)
    model.extra = hold(torch.ones(3))
    optimized(model, example, plugins=[plugin(DerivedScale)])
    with torch.no_grad():
        model(example)
        assert fast_calls(model) == 1
        change(model.extra)
        assert torch.equal(model(example), eager(model)(example))
    assert fast_calls(model) == 1, "stale copies served"
