"""Graphs of repeated blocks: one block is compiled for all, and the values are the model's."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch._subclasses import FakeTensor

from kpt.compiling import CompiledForward, RepeatedParts
from repeated_blocks import Block, Eager, Model, blocks, compiled, exchange


@torch.no_grad()
def test_one_block_is_compiled_for_all_and_the_weights_are_those_of_each():
    torch.manual_seed(0)
    model, x = Model(blocks(9)), torch.randn(2, 5, 8)
    forward, parts, backend = compiled(model)
    assert torch.equal(forward(x)["logits"], model(x)["logits"])
    assert parts.parts >= 9 and parts.distinct == len(backend.graphs) <= 3
    tensors = [x for inputs in backend.inputs for x in inputs if isinstance(x, torch.Tensor)]
    assert tensors and all(isinstance(x, FakeTensor) for x in tensors)
    model.blocks[4].back.weight.mul_(3.0)
    model.blocks[8].norm.bias.add_(1.0)
    result = forward(x)
    assert all(torch.equal(result[name], value) for name, value in model(x).items())
    assert forward.graphs == 1 and forward.misses == 0


@torch.no_grad()
def test_the_operations_that_are_compiled_are_those_of_one_block_and_the_ends():
    model = Model(blocks(12))
    forward, _, backend = compiled(model)
    forward(torch.randn(2, 5, 8))
    whole = Eager()
    CompiledForward(model.forward, backend=whole)(torch.randn(2, 5, 8))
    operations = [
        sum(1 for graph in graphs for node in graph.graph.nodes if node.op.startswith("call"))
        for graphs in (backend.graphs, whole.graphs)
    ]
    assert operations[0] < 0.35 * operations[1]


@torch.no_grad()
def test_a_block_that_looks_alike_and_differs_is_compiled_for_itself():
    torch.manual_seed(1)
    model, x = Model([*blocks(4), Block(factor=0.5), *blocks(5)]), torch.randn(2, 5, 8)
    model.blocks[7].norm.eps = 0.3
    forward, parts, _ = compiled(model)
    assert torch.equal(forward(x)["logits"], model(x)["logits"])
    assert parts.distinct < parts.parts


@torch.no_grad()
def test_blocks_that_take_turns_repeat_in_pairs():
    model, x = Model([Block(factor=0.5 + n % 2) for n in range(8)]), torch.randn(2, 5, 8)
    forward, parts, _ = compiled(model)
    assert torch.equal(forward(x)["logits"], model(x)["logits"])
    assert parts.distinct < parts.parts <= 7


class Sized(Model):
    """Uses sizes that no input of a block has as a dimension of its own."""

    def forward(self, x):
        length = x.shape[1]
        x = self.first(x).reshape(-1, 8)
        early = x.exp().mean(-1, keepdim=True)
        for block in self.blocks:
            x = block(x, early) * (length / (1.0 + length)) + x.view(-1, length, 8).sum(1).mean()
        return self.last(x).view(-1, length, 3)


@torch.no_grad()
@pytest.mark.parametrize("kind", [Model, Sized])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_one_part_serves_sizes_that_were_declared_dynamic(kind, backend: str):
    torch.manual_seed(2)
    model = kind(blocks(6))
    parts = RepeatedParts(backend)
    dims = {"x": {0: "batch", 1: "length"}}
    forward = CompiledForward(model.forward, backend=parts, dynamic_dims=dims)
    for batch, length in [(2, 5), (3, 7), (4, 2), (7, 11)]:
        x = torch.randn(batch, length, 8)
        result, true = forward(x), model(x)
        for name in true if isinstance(true, dict) else [...]:
            torch.testing.assert_close(result[name], true[name], rtol=1e-5, atol=1e-5)
    assert forward.graphs == 1 and parts.distinct < parts.parts
    forward.dispose()


class Twice(nn.Module):
    """Two stacks, the second of which sees the whole of the first; a long skip; a weight that is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = Model(blocks(5)), Model(blocks(4, factor=0.7))
        self.up.blocks[3].wide.weight = self.up.blocks[0].wide.weight

    def forward(self, x, *, scale: float = 1.0):
        before = self.down.first(x)
        y = before
        for block in self.down.blocks:
            y = block(y, x[..., :1])
        z = y * scale
        for block in self.up.blocks:
            z = block(z, y[..., :1]) + before
        return [z, (y, None)]


@torch.no_grad()
def test_two_stacks_are_cut_each():
    torch.manual_seed(3)
    model, x = Twice(), torch.randn(2, 5, 8)
    forward, parts, backend = compiled(model)
    (z, (y, nothing)), (true_z, (true_y, _)) = forward(x, scale=0.5), model(x, scale=0.5)
    assert torch.equal(z, true_z) and torch.equal(y, true_y) and nothing is None
    assert parts.parts >= 9 and len(backend.graphs) <= 6


@torch.no_grad()
def test_nothing_of_the_parts_outlives_the_forward():
    model = Model(blocks(6))
    forward, _, backend = compiled(model)
    forward(torch.randn(2, 5, 8))
    graphs = [weakref.ref(graph) for graph in backend.graphs]
    backend.graphs.clear()
    backend.inputs.clear()
    forward.dispose()
    del forward
    gc.collect()
    assert not [graph() for graph in graphs if graph() is not None]


class Reversible(Block):
    def forward(self, x, early):
        left, right = x.chunk(2, -1)
        left = left + right.tanh() * early
        right = right + left.sigmoid()
        return torch.cat([left * 1.5, right.exp().neg()], -1)


@torch.no_grad()
def test_no_tuple_crosses_a_cut():
    torch.manual_seed(6)
    model, x = Model([Reversible() for _ in range(12)]), torch.randn(2, 5, 8)
    parts = RepeatedParts("inductor")
    forward = CompiledForward(model.forward, backend=parts)
    torch.testing.assert_close(forward(x)["logits"], model(x)["logits"], rtol=1e-4, atol=1e-4)
    assert parts.distinct < parts.parts
    forward.dispose()


@torch.no_grad()
def test_parts_are_compiled_for_what_parts_before_them_yield_after_graph_passes():
    """A pass exchanged an operation for one with other strides."""
    model, x = Model([Turning() for _ in range(8)]), torch.randn(2, 5, 8)
    seen = []

    class Strides(Eager):
        def __call__(self, graph, example_inputs):
            strides = [t.stride() for t in example_inputs if isinstance(t, torch.Tensor)]
            super().__call__(graph, example_inputs)

            def run(*inputs):
                seen.append([t.stride() for t in inputs if isinstance(t, torch.Tensor)] == strides)
                return graph(*inputs)

            return run

    forward = CompiledForward(model.forward, backend=RepeatedParts(Strides()), graph_pass=exchange)
    assert torch.allclose(forward(x)["logits"], model(x)["logits"])
    assert len(seen) >= 8 and all(seen)


class Turning(Block):
    """The narrowest place to cut is after the operation that is exchanged."""

    def forward(self, x, early):
        left, right = self.wide(self.norm(x)).chunk(2, -1)
        return torch.tanh(self.back(torch.cat([left.sin(), right.cos()], -1)).exp() * 0.5)
