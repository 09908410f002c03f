"""Models whose forward is no single graph, compiled in parts: what is gained, and what stays as it was."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from observing import applied, observe, relative, variants

import kpt
from kpt.specs import PassSpec
from kpt_plugin_cpu.captured import Captured
from kpt_plugin_cpu.inductor import Inductor, compiler

compiles = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


class Slow(nn.Module):
    """Many operations on each element, which a compiler makes one loop of.

    None is a function that eager's library computes faster than a compiler does, as MKL does on some CPUs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for _ in range(6):
            y = 0.5 * (y * self.scale).relu() + 0.25 * (y - self.scale).abs() - 0.25 * y.clamp(-1.0, 1.0)
        return x + y


class Choosing(nn.Module):
    """Goes one way or the other by what its first part computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.often, self.seldom = Slow(), nn.ModuleList([Slow(), Slow(), Slow()]), Slow()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if x.mean().item() > 50.0:
            return self.seldom(x)
        for part in self.often:
            x = part(x)
        return x


@pytest.fixture
def one_thread():
    """With more threads than a busy machine has cores for, a call waits for the slowest of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class InductorAlone:
    def __init__(self, name: str) -> None:
        self.name = name

    @kpt.hookimpl
    def kpt_passes(self):
        yield PassSpec("inductor", "compile", f"few_variants:{self.name}")


@compiles
def test_what_can_be_captured_is_compiled_and_the_receipt_says_so(one_thread):
    torch.manual_seed(5)
    model, x = Choosing().eval(), torch.randn(16, 128, 64)
    kpt.optimize(model, (x,), level="exact", plugins=[InductorAlone("Frozen")], budget=60, cache=False)
    receipt = kpt.report(model)
    (kept,) = receipt.accepted
    assert kept.name == "inductor:frozen"
    assert "compiled in 4 parts (first, often.0, often.1, often.2)" in kept.reason
    assert "can't be captured" in kept.reason
    with torch.no_grad():
        for inputs in (torch.randn(16, 128, 64), torch.full_like(x, 200.0)):
            assert relative(model(inputs), Choosing.forward(model, inputs)) < 1e-5
        assert kpt.report(model).calls["misses"], "the other way was not compiled: it is counted"
        model.often[1].scale.mul_(3.0)
        assert relative(model(x), Choosing.forward(model, x)) < 1e-5
    kpt.restore(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


@compiles
@torch.no_grad()
def test_equal_parts_are_compiled_once_with_packed_weights():
    class Feed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.wide, self.back = nn.LayerNorm(64), nn.Linear(64, 256), nn.Linear(256, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.back(nn.functional.gelu(self.wide(self.norm(x))))

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Feed() for _ in range(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                if x.isnan().any():
                    raise ValueError("not a number")
                x = layer(x)
            return x

    model, x = Stack().eval(), torch.randn(2, 7, 64)
    offers = {offer.name: offer for offer in variants(Inductor(), observe(model, x))}
    behaviour, space, undo = applied(Inductor, model, offers["repeated blocks"])
    assert relative(space.forward(x), model(x)) < 1e-5
    assert behaviour.verify_applied(space) and "5 parts" in behaviour.effect()
    assert (behaviour.repeated.parts, behaviour.repeated.distinct) == (5, 1)
    with pytest.raises(ValueError, match="not a number"):
        space.forward(x * float("nan"))
    undo()
    assert not any("forward" in module.__dict__ for module in space.modules())


@torch.no_grad()
def test_parts_of_a_captured_graph_follow_the_weights():
    model, x = Choosing().eval(), torch.randn(2, 7, 64)
    (offer,) = variants(Captured(), observe(model, x, baseline_seconds=1e-4))
    behaviour, space, undo = applied(Captured, model, offer)
    assert torch.equal(space.forward(x), model(x))
    assert behaviour.verify_applied(space) and "4 parts" in behaviour.effect()
    model.first.scale.mul_(2.0)
    assert torch.equal(space.forward(x), model(x))
    undo()
    assert not any("forward" in module.__dict__ for module in space.modules())
