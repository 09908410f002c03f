"""Modules whose forward is no single graph: their largest parts are compiled, and all else stays as it is."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from kpt.compiling import CapturedForward, CompiledForward, CompiledModule, RepeatedParts, collect


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.wide, self.back = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.back(nn.functional.gelu(self.wide(self.norm(x))))


class Asking(nn.Module):
    """Looks at a value between its parts."""

    def __init__(self, blocks: int = 3, last: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.other, self.last = Block(), last or nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        if x.abs().mean().item() > 100.0:
            return self.last(self.other(x))
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Compiles:
    """A backend that counts its graphs and leaves them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


def forwards(model: nn.Module) -> list[str]:
    return [name for name, each in model.named_modules() if "forward" in each.__dict__]


@torch.no_grad()
def test_parts_are_compiled_where_the_whole_cannot_be():
    model, x = Asking().eval(), torch.randn(2, 5, 8)
    true = model(x)
    with collect() as created:
        compiled = CompiledModule(model, backend="eager")
    assert created == [compiled] and model.forward is compiled
    assert torch.equal(model(x), true)
    assert "forward" not in model.__dict__, "calls of what can't be captured go through us for nothing"
    assert compiled.ran and "Asking" not in compiled.told
    assert "4 parts (stem, blocks.0, blocks.1, blocks.2)" in compiled.told
    assert compiled.uncaptured[:100] in compiled.told, "the reason is told"
    compiled.seal()
    before = sum(each.executions for each in compiled.members())
    assert torch.equal(model(x), true)
    assert sum(each.executions for each in compiled.members()) == before + 4
    # The other branch was not seen before: its part runs as it is, and is counted.
    assert torch.allclose(model(x * 1e4), Asking.forward(model, x * 1e4))
    assert {each.label: each.misses for each in compiled.members() if each.misses}.keys() == {"other"}
    compiled.dispose()
    assert forwards(model) == [] and torch.equal(model(x), true)


class Tables(nn.Module):
    """Keeps a table for each length, so that the whole is another graph for each."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.last, self.tables = Block(), nn.Linear(8, 3), {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] not in self.tables:
            self.tables[x.shape[1]] = torch.arange(float(x.shape[1])).reshape(-1, 1)
        return self.last(self.block(x + self.tables[x.shape[1]]))


@torch.no_grad()
def test_parts_are_compiled_where_the_whole_asks_for_one_size_of_a_dynamic_axis():
    model, backend = Tables().eval(), Compiles()
    examples = [torch.randn(2, length, 8) for length in (5, 7, 11)]
    true = [model(x) for x in examples]
    compiled = CompiledModule(model, backend=backend, dynamic_dims={"x": {1: "length"}})
    for _ in range(2):
        for x, y in zip(examples, true):
            torch.testing.assert_close(model(x), y)
    compiled.seal()
    assert compiled.ran and [each.label for each in compiled.members()] == ["block"]
    before = sum(each.misses for each in compiled.members())
    torch.testing.assert_close(model(examples[1]), true[1])
    assert sum(each.misses for each in compiled.members()) == before
    assert "dynamic" in compiled.told, compiled.told
    compiled.dispose()
    assert forwards(model) == []


@torch.no_grad()
def test_a_whole_graph_is_one_member():
    model, x = Block().eval(), torch.randn(2, 5, 8)
    compiled = CompiledModule(model, backend="eager")
    assert torch.equal(model(x), Block.forward(model, x))
    assert list(compiled.members()) == [compiled] and compiled.told == "" and compiled.ran
    compiled.dispose()
    assert forwards(model) == []


@torch.no_grad()
def test_equal_parts_are_compiled_once():
    model, x = Asking(blocks=6).eval(), torch.randn(2, 5, 8)
    true, backend = model(x), Compiles()
    repeated = RepeatedParts(backend)
    compiled = CompiledModule(model, backend=repeated)
    assert torch.equal(model(x), true)
    assert backend.graphs == repeated.distinct == 2, "the stem, and one block for all"
    assert repeated.parts == 7
    model.blocks[3].wide.weight.mul_(2.0)
    assert torch.equal(model(x), Asking.forward(model, x)), "weights are inputs of what is compiled"
    compiled.dispose()


class Branching(nn.Module):
    """Cannot be captured, nor can its only part."""

    class Inner(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum() > 0.0 else x

    def __init__(self) -> None:
        super().__init__()
        self.inner = Branching.Inner()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if x.sum() < 100.0 else x


@torch.no_grad()
def test_where_nothing_can_be_captured_the_reason_is_raised():
    model, x = Branching().eval(), torch.randn(4)
    compiled = CompiledModule(model, backend="eager")
    assert torch.equal(model(x), Branching.forward(model, x))
    with pytest.raises(RuntimeError, match=r"neither the forward nor a part of it can be captured: \w+"):
        assert compiled.ran
    compiled.dispose()
    alone = CompiledModule(inner := Branching.Inner(), backend="eager")
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        inner(x)
    alone.dispose()
    assert forwards(model) == forwards(inner) == []


class Between(nn.Module):
    """Parts within parts: the middle one can't be captured either."""

    def __init__(self) -> None:
        super().__init__()
        self.middle, self.recurrent, self.shared = (
            Asking(last=Block()),
            nn.LSTM(8, 8, batch_first=True),
            Block(),
        )
        self.again = self.shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.recurrent(self.middle(x))
        return self.again(self.shared(x))


@torch.no_grad()
def test_parts_are_looked_for_at_every_depth():
    model, x = Between().eval(), torch.randn(2, 5, 8)
    true = model(x)
    compiled = CompiledModule(model, backend="eager")
    assert torch.equal(model(x), true)
    labels = [each.label for each in compiled.members() if each.graphs]
    assert labels == [
        "middle.stem",
        "middle.blocks.0",
        "middle.blocks.1",
        "middle.blocks.2",
        "middle.last",
        "shared",
    ]
    compiled.dispose()
    assert forwards(model) == []


@torch.no_grad()
def test_axes_that_differ_between_calls_become_dynamic():
    model = Asking().eval()
    compiled = CompiledModule(model, backend="eager", dynamic_dims={"x": {0: "batch", 1: "sequence"}})
    for batch, length in ((2, 5), (3, 7)):
        model(torch.randn(batch, length, 8))
    compiled.seal()
    for batch, length in ((4, 9), (7, 3), (2, 11)):
        x = torch.randn(batch, length, 8)
        assert torch.allclose(model(x), Asking.forward(model, x), atol=1e-6)
    assert not any(each.misses for each in compiled.members())
    compiled.dispose()


def test_gradients_flow_through_parts():
    model, x = Asking(), torch.randn(2, 5, 8)
    true = torch.autograd.grad(model(x).square().sum(), list(model.stem.parameters()))
    compiled = CompiledModule(model, backend="eager")
    found = torch.autograd.grad(model(x).square().sum(), list(model.stem.parameters()))
    assert compiled.parts and all(torch.allclose(a, b) for a, b in zip(found, true))
    compiled.dispose()


@torch.no_grad()
def test_what_was_put_around_a_forward_stays_around_it():
    model, x = Asking().eval(), torch.randn(2, 5, 8)
    compiled = CompiledModule(model, backend="eager")
    inner, calls = model.forward, []

    def around(*args):
        calls.append(len(args))
        return inner(*args)

    model.forward = around
    model(x)
    model(x)
    assert model.forward is around and calls == [1, 1] and compiled.parts
    del model.__dict__["forward"]
    compiled.dispose()
    assert forwards(model) == []


@torch.no_grad()
def test_parts_take_over_the_passes_of_a_captured_forward():
    model, x, seen = Asking().eval(), torch.randn(2, 5, 8), []

    def note(graph, example_inputs):
        seen.append(len(graph.graph.nodes))
        return graph

    with collect() as created:
        model.forward = captured = CapturedForward(model.forward, note)
        compiled = CompiledModule(model, backend="eager")
    assert created == [compiled] and captured.idle
    model(x)
    assert len(seen) == 4, "each part's graph goes through the pass"
    compiled.dispose()
    assert model.forward is captured


@torch.no_grad()
def test_nothing_is_held_after_the_end():
    model, x = Asking().eval(), torch.randn(2, 5, 8)
    compiled = CompiledModule(model, backend="eager")
    model(x)
    compiled.dispose()
    held = [weakref.ref(each) for each in (model, compiled, *compiled.parts)]
    del model, compiled
    gc.collect()
    assert [each() for each in held] == [None] * len(held)


@torch.no_grad()
def test_what_a_backend_refuses_is_not_refused_again_by_parts():
    def refuse(graph, example_inputs):
        raise ValueError("not by me")

    model = nn.Sequential(Block(), Block())
    compiled = CompiledModule(model, backend=refuse)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="not by me"):
        model(torch.randn(2, 5, 8))
    assert compiled.parts == [] and isinstance(model.forward, CompiledForward)
    compiled.dispose()


class Switching(nn.Module):
    """Changes what its part depends on between calls of it."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mode, self.norm = "double", nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x) * 2 if self.mode == "double" else self.norm(x) * 3

    def __init__(self) -> None:
        super().__init__()
        self.part = Switching.Part()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.part.mode = "double" if x.sum().item() > 0.0 else "triple"
        y = self.part(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=x.max().item() > 50.0):
            return y + self.part(x)


@torch.no_grad()
def test_parts_follow_what_the_code_between_them_changes():
    model = Switching().eval()
    compiled = CompiledModule(model, backend="eager")
    ones = torch.ones(2, 3)
    for seal in (False, True):
        for x in (ones, -ones, 2 * ones, -2 * ones, 60 * ones):
            assert torch.equal(model(x), Switching.forward(model, x)) and model(x)[0, 0] in (
                4,
                -6,
                8,
                -12,
                240,
            )
        if not seal:
            compiled.seal()
    assert compiled.parts and compiled.parts[0].executions
    compiled.dispose()


class Twice(nn.Module):
    """A block that is the root's, too, and one that two of its parts hold."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.first, shared = self.blocks[0], Block()
        self.left, self.right = nn.Sequential(shared, nn.GELU()), nn.Sequential(nn.GELU(), shared)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if x.sum() > 1e9:
            return x
        return self.right(self.left(self.blocks[1](x)))


@torch.no_grad()
def test_what_has_several_parents_is_no_part_of_its_own():
    model, x = Twice().eval(), torch.randn(2, 5, 8)
    compiled = CompiledModule(model, backend="eager")
    for _ in range(2):
        assert torch.equal(model(x), Twice.forward(model, x))
    assert [each.label for each in compiled.members() if each.graphs] == ["blocks.1", "left", "right"]
    compiled.dispose()
    assert forwards(model) == []


class Bodies(nn.Module):
    """Parts whose graphs differ in the bodies of an operator only."""

    class Choice(nn.Module):
        def __init__(self, one, other) -> None:
            super().__init__()
            self.one, self.other = one, other

        def forward(self, x: torch.Tensor, flag: torch.Tensor) -> torch.Tensor:
            return torch.cond(flag, self.one, self.other, (x,))

    def __init__(self) -> None:
        super().__init__()
        self.a = Bodies.Choice(lambda x: x.sin(), lambda x: x.cos())
        self.b = Bodies.Choice(lambda x: x.exp(), lambda x: x.tanh())

    def forward(self, x: torch.Tensor, flag: torch.Tensor) -> torch.Tensor:
        x = self.a(x, flag)
        return self.b(x, flag) if x.sum().item() < 1e9 else x


@torch.no_grad()
def test_parts_with_bodies_are_not_taken_for_equal():
    model, x, repeated = Bodies().eval(), torch.randn(4), RepeatedParts(Compiles())
    compiled = CompiledModule(model, backend=repeated)
    for flag in (torch.tensor(True), torch.tensor(False)):
        assert torch.allclose(model(x, flag), Bodies.forward(model, x, flag))
        one = x.sin().exp() if flag else x.cos().tanh()
        assert torch.allclose(model(x, flag), one)
    assert repeated.parts == repeated.distinct
    compiled.dispose()


class ByKind(nn.Module):
    class Part(nn.Module):
        def forward(self, x: torch.Tensor, kind: str) -> torch.Tensor:
            if kind == "asks" and x.sum() > 0.0:
                return x - 1
            return x + 1

    def __init__(self) -> None:
        super().__init__()
        self.part = ByKind.Part()

    def forward(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        return self.part(x, kind) if x.sum().item() < 1e9 else x * 2


@torch.no_grad()
def test_a_kind_of_call_that_cannot_be_captured_runs_as_it_is():
    model, x = ByKind().eval(), torch.ones(4)
    compiled = CompiledModule(model, backend="eager")
    assert torch.equal(model(x, "plain"), x + 1)
    assert torch.equal(model(x, "asks"), x - 1) and torch.equal(model(-x, "asks"), -x + 1)
    assert torch.equal(model(x, "plain"), x + 1)
    (part,) = compiled.parts
    assert part.graphs == 1 and part.misses == 2
    compiled.dispose()
