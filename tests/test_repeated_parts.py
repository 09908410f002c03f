"""Graphs of repeated blocks: what is compiled once, what is not, and that the values are the model's."""

from __future__ import annotations

import gc
import operator
import weakref

import numpy
import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._subclasses import FakeTensor

from kpt.compiling import CompiledForward, RepeatedParts


class Block(nn.Module):
    """A residual block of about ten operations."""

    def __init__(self, width: int = 8, factor: float = 1.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide, self.back = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.factor = factor

    def forward(self, x: torch.Tensor, early: torch.Tensor) -> torch.Tensor:
        hidden = self.wide(self.norm(x)) * self.factor
        left, right = hidden.chunk(2, -1)
        right = right.masked_fill(operator.and_(early > 9.0, early < 0.0), 0.0)
        gated = torch.cat([left.sigmoid() * left, right.tanh() + early], -1)
        return x + self.back(gated).transpose(0, 1).contiguous().transpose(0, 1)


class Model(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.first(x)
        early = x.exp().mean(-1, keepdim=True)
        for block in self.blocks:
            x = block(x, early)
        return {"logits": self.last(x), "pooled": x.mean(1)}


class Eager:
    """A backend that leaves graphs as they are and remembers them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.inputs: list[list[object]] = []

    def __call__(self, graph, example_inputs):
        self.inputs.append(example_inputs)
        self.graphs.append(graph)
        return graph.forward


def compiled(model: nn.Module, **options) -> tuple[CompiledForward, RepeatedParts, Eager]:
    backend = Eager()
    parts = RepeatedParts(backend)
    return CompiledForward(model.forward, backend=parts, **options), parts, backend


def blocks(count: int, **settings) -> list[nn.Module]:
    return [Block(**settings) for _ in range(count)]


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


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2])
def test_what_does_not_repeat_is_refused_with_what_to_do(count: int):
    model = Model([Block(factor=1.0 + n) for n in range(count)])
    forward, _, _ = compiled(model)
    with pytest.raises(Exception, match="no block repeats among the .* operations .* compile it whole"):
        forward(torch.randn(2, 5, 8))
    assert forward.graphs == 0


class InPlace(Block):
    def forward(self, x, early):
        x += super().forward(x, early)
        return x


class Switching(Block):
    def forward(self, x, early):
        with torch.no_grad():
            early = early.square()
        return super().forward(x, early)


@pytest.mark.parametrize(("kind", "grad"), [(InPlace, False), (InPlace, True), (Switching, True)])
def test_nothing_is_cut_where_tensors_are_changed_in_place_or_modes_switched(kind, grad: bool):
    model = Model([kind() for _ in range(6)]).requires_grad_(False)
    forward, _, _ = compiled(model)
    with torch.set_grad_enabled(grad), pytest.raises(Exception, match="no block repeats among the"):
        forward(torch.randn(2, 5, 8))


class Masked(Model):
    """Changes what it was given in place, and its own tensors, before the blocks."""

    def forward(self, x):
        x.clamp_(-1.0, 1.0)
        x = x * 2
        x[:, 0] = 0.5
        torch.nn.functional.relu(x, True)
        return super().forward(x)


@torch.no_grad()
def test_what_is_changed_in_place_before_the_blocks_stays_in_one_part():
    model, x = Masked(blocks(6)), 3 * torch.randn(2, 5, 8)
    forward, parts, _ = compiled(model)
    given, other = x.clone(), x.clone()
    assert torch.equal(forward(given)["logits"], model(other)["logits"])
    assert torch.equal(given, other) and not torch.equal(given, x)
    given, other = x.clone(), x.clone()
    assert torch.equal(forward(given)["logits"], model(other)["logits"]) and torch.equal(given, other)
    assert parts.distinct < parts.parts


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


class Plain(Block):
    """Without a residual, so that one value crosses everywhere."""

    def forward(self, x, early):
        return self.back(torch.tanh(self.wide(self.norm(x))))


class Mapped(Plain):
    def forward(self, x, early):
        return torch.vmap(lambda each: self.back(torch.tanh(self.wide(self.norm(each)))))(x)


@torch.no_grad()
def test_no_level_of_a_transform_is_left_open():
    model, x = Model([Mapped() for _ in range(8)]), torch.randn(2, 5, 8)
    forward, _, backend = compiled(model)
    with pytest.raises(Exception, match="no block repeats among the .*writes in place or the like"):
        forward(x)
    assert torch._C._functorch.peek_interpreter_stack() is None and not backend.graphs


class MovesStatistics(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.moving = nn.BatchNorm1d(5).train()

    def forward(self, x, early):
        return self.moving(super().forward(x, early))


class MovesStatisticsByDefault(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("variance", torch.ones(5))

    def forward(self, x, early):
        return nn.functional.instance_norm(super().forward(x, early), self.mean, self.variance)


class Renorms(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 8, max_norm=1.0)

    def forward(self, x, early):
        return super().forward(x, early) + self.table(torch.arange(5)) + self.table.weight.sum()


class Strided(Plain):
    def forward(self, x, early):
        half = super().forward(x, early).reshape(-1)[40:]
        return half.as_strided((1, 5, 8), (40, 8, 1), 40).sin() + x


class TurnsInPlace(Plain):
    def forward(self, x, early):
        return super().forward(x.sin().transpose_(0, 1), early).transpose(0, 1)


@torch.no_grad()
@pytest.mark.parametrize("kind", [MovesStatistics, MovesStatisticsByDefault, Renorms, Strided, TurnsInPlace])
def test_blocks_that_write_or_address_memory_in_other_ways_are_not_cut(kind):
    model, x = Model([kind() for _ in range(8)]), torch.randn(2, 5, 8)
    forward, _, backend = compiled(model)
    with pytest.raises(Exception, match="no block repeats among the"):
        forward(x)
    assert not backend.graphs, "something was compiled for a graph that is refused"


class Checkpointed(Block):
    def forward(self, x, early):
        return torch.utils.checkpoint.checkpoint(super().forward, x, early, use_reentrant=False)


def test_blocks_that_are_alike_and_not_equal_are_refused_before_anything_is_compiled():
    """The body of each operator is a graph of its own."""
    model, x = Model([Checkpointed() for _ in range(40)]), torch.randn(2, 5, 8)
    forward, _, backend = compiled(model)
    with pytest.raises(Exception, match="no block repeats among the"):
        forward(x)
    assert not backend.graphs


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


def turned(x: torch.Tensor) -> torch.Tensor:
    return x.tanh().transpose(-1, -2).contiguous().transpose(-1, -2)


def exchange(graph, example_inputs):
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target is torch.tanh:
            node.target = turned
    graph.recompile()
    return graph


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


@torch.library.custom_op("kpt_test_parts::zero_into", mutates_args={"x"})
def zero_into(x: torch.Tensor) -> None:
    x.zero_()


class Writes(Block):
    """Writes to what it made itself: by ``kind`` of write, to the tensor or to a view, between reads."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x, early):
        made = self.back(self.wide(self.norm(x)))
        view, before = made[..., 2:6], made.sum(-1, keepdim=True)
        if self.kind == "add":
            made += early
        elif self.kind == "view":
            view *= early
        elif self.kind == "item":
            made[:, 1:] = early[:, 1:]
        elif self.kind == "scatter":
            made.index_add_(1, torch.tensor([0, 2, 0]), x[:, :3])
        elif self.kind == "out":
            torch.mul(x, early, out=made)
        elif self.kind == "operator":
            torch.ops.kpt_test_parts.zero_into(view)
        elif self.kind == "reshaped":
            made.reshape(-1)[3:9].fill_(0.25)
        elif self.kind == "twice":
            view.add_(1.0)
            made.transpose(1, 2).mul_(early.transpose(1, 2))
        return x + made + view.mean() * before


KINDS = ["add", "view", "item", "scatter", "operator", "reshaped", "twice"]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_write_to_what_a_block_made_itself_stays_in_its_part(kind: str):
    torch.manual_seed(4)
    model, x = Model([Writes(kind) for _ in range(8)]), torch.randn(2, 5, 8)
    parts = RepeatedParts("aot_eager")
    forward = CompiledForward(model.forward, backend=parts)
    result, true = forward(x.clone()), model(x.clone())
    assert all(torch.allclose(result[name], true[name], atol=1e-5) for name in true)
    assert parts.parts >= 8 and parts.distinct <= 4
    forward.dispose()


@torch.no_grad()
def test_a_write_of_which_the_target_is_not_known_keeps_all_its_inputs_together():
    """Which of its arguments an operation with an ``out`` writes to is not looked at."""
    forward, _, backend = compiled(Model([Writes("out") for _ in range(8)]))
    with pytest.raises(Exception, match="no block repeats among the .*writes in place"):
        forward(torch.randn(2, 5, 8))
    assert not backend.graphs


class Late(nn.Module):
    """Each block writes to what the block before it made: ``far`` through a view that was made before it."""

    def __init__(self, far: bool) -> None:
        super().__init__()
        self.blocks, self.far = nn.ModuleList(blocks(8)), far

    def forward(self, x):
        early = x.exp().mean(-1, keepdim=True)
        made, view = x * 2, x[..., :1]
        for block in self.blocks:
            after = block(made, early)
            (view if self.far else made).mul_(0.5)
            x = x + made.sum(-1, keepdim=True)
            made, view = after, after[..., 1:3]
        return x, made


@torch.no_grad()
@pytest.mark.parametrize("far", [False, True])
def test_a_write_to_what_an_earlier_block_made_is_never_cut_off_from_it(far: bool):
    """Each block is tied to the next, so that there is no place to cut."""
    torch.manual_seed(5)
    forward, _, backend = compiled(Late(far))
    with pytest.raises(Exception, match="no block repeats among the .*writes in place"):
        forward(torch.randn(2, 5, 8))
    assert not backend.graphs


class TurningAndWriting(Block):
    def forward(self, x, early):
        hidden = self.back(torch.tanh(self.wide(self.norm(x))))
        flat = hidden.reshape(-1)
        flat += 1.0
        return torch.tanh(x + hidden)


@torch.no_grad()
def test_nothing_is_cut_where_a_pass_may_have_made_views_of_copies_that_are_written_to():
    model = Model([TurningAndWriting() for _ in range(8)])
    forward = CompiledForward(model.forward, backend=RepeatedParts("aot_eager"), graph_pass=exchange)
    with pytest.raises(Exception, match="strides that were not recorded"):
        forward(torch.randn(2, 5, 8))


class Counting(nn.Module):
    """Writes through an array of numpy's to what a block made, beside what an equal one made."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.blocks, self.named = nn.ModuleList(blocks(8)), named

    def forward(self, x):
        early = x.exp().mean(-1, keepdim=True)
        made = []
        for block in self.blocks:
            x = block(x, early)
            made.append(x)
        array = made[2].numpy()
        if self.named:
            array += 1.0
        else:
            numpy.add(array, 1.0, array)
        return made[2] + made[4], x


@torch.no_grad()
@pytest.mark.parametrize("named", [True, False])
def test_a_write_that_nothing_announces_is_seen_when_the_parts_run_on_fake_values(named: bool):
    forward = CompiledForward(Counting(named).forward, backend=RepeatedParts("aot_eager"))
    with pytest.raises(BackendCompilerFailed, match="was not known to write; compile it whole"):
        forward(torch.randn(2, 5, 8))
    forward.dispose()
