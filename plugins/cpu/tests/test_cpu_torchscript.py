"""Tracing captured graphs: weights and sizes, and what stays of it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import fx

from kpt_plugin_cpu.torchscript import Frozen, traced


def graph() -> fx.GraphModule:
    return fx.symbolic_trace(lambda size, weight, x: ((x @ weight).reshape(size, -1), x))


def test_weights_are_attributes_and_sizes_are_read_off_tensors():
    weight = torch.randn(4, 6)
    script = traced(Frozen(graph(), {1: weight}, 3, {0: (2, 0)}), (torch.randn(3, 4),))
    assert [name for name, _ in script.named_buffers()] == ["fixed_1"]
    for rows in (3, 5):
        x = torch.randn(rows, 4)
        product, same = script(x)
        assert torch.equal(product, x @ weight) and torch.equal(same, x)


def test_nothing_stays_in_the_units_of_the_process():
    unit = torch.jit._state._python_cu
    before = len(unit.get_functions())
    weight = torch.randn(4, 6)
    frozen = Frozen(graph(), {1: weight}, 3, {0: (2, 0)})
    script = traced(frozen, (torch.randn(3, 4),))
    assert torch.jit._state._python_cu is unit and len(unit.get_functions()) == before
    gone = weakref.ref(frozen)
    del frozen, script
    gc.collect()
    assert gone() is None


def test_an_error_in_the_trace_puts_the_unit_back():
    unit = torch.jit._state._python_cu
    with pytest.raises(RuntimeError):
        traced(Frozen(graph(), {}, 3), (torch.tensor(2), torch.randn(4, 6), torch.randn(3, 5)))
    assert torch.jit._state._python_cu is unit
    assert torch.jit.script(torch.nn.ReLU())(torch.tensor([-1.0])) == 0.0
