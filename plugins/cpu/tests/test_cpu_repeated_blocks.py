"""Blocks compiled once for all, with packed weights: the values, what is packed, and when it is offered."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from observing import applied, observe, relative, variants

import kpt
from kpt.compiling import CompiledForward
from kpt.specs import PassSpec
from kpt_plugin_cpu.bf16 import Bf16
from kpt_plugin_cpu.estimates import compile_seconds
from kpt_plugin_cpu.inductor import Inductor, compiler, repeated_blocks, repeated_share
from kpt_plugin_cpu.int8 import Int8
from kpt_plugin_cpu.packed_weights import PackedWeights

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

WIDTH = 128


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.wide, self.back = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.back(nn.functional.gelu(self.wide(x)))


class Stack(nn.Module):
    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x)


def offered(model: nn.Module, *examples: torch.Tensor, **facts: object):
    found = {offer.name: offer for offer in variants(Inductor(), observe(model, examples, **facts))}
    return found.get("repeated blocks")


@torch.no_grad()
@pytest.mark.parametrize(
    ("policy", "name", "most"),
    [(None, "", 1e-6), (Bf16, "cast", 2e-2), (Int8, "linears, bfloat16 between", 4e-2)],
)
def test_it_computes_what_the_model_does_and_its_undo_restores(policy, name: str, most: float):
    model, x, mask = Stack().eval(), torch.randn(2, 9, WIDTH), torch.randn(2, 1, 9, 9)
    offer = offered(model, x, mask)
    assert offer is not None and offer.derives and offer.compute_dtype is None
    lowered = [v for v in variants(policy(), observe(model, (x, mask))) if v.name == name] if policy else []
    precision, space, undo_precision = applied(policy, model, *lowered) if policy else (None, None, None)
    behaviour, space, undo = (
        applied(Inductor, model, offer)
        if space is None
        else ((behaviour := Inductor()), space, behaviour.apply(space, offer))
    )
    assert not behaviour.verify_applied(space)
    for examples in [(x, mask), (2 * x, mask + 1)]:
        assert relative(space.forward(*examples), model(*examples)) < most
    assert behaviour.verify_applied(space)
    assert behaviour.repeated.parts >= 6 and behaviour.repeated.distinct <= 4
    packed = behaviour.compiled.graph_pass.packed.packed
    in_bf16 = {None: 0, Bf16: 2 + 4 * 6, Int8: 1}[policy]
    assert len(packed) == 2 + 4 * 6 - (0 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else in_bf16)
    undo()
    assert not packed
    if undo_precision is not None:
        undo_precision()
    assert "forward" not in space.__dict__ and torch.equal(space(x), model(x))


@torch.no_grad()
def test_declared_sizes_are_served_without_another_compilation():
    model, x = Stack().eval(), torch.randn(2, 9, WIDTH)
    offer = offered(model, x, dynamic_shapes={"x": {0: "batch", 1: "length"}})
    behaviour, space, undo = applied(Inductor, model, offer)
    space.forward(x)
    for batch, length in [(3, 4), (5, 40), (2, 7)]:
        x = torch.randn(batch, length, WIDTH)
        assert relative(space.forward(x), model(x)) < 1e-6
    assert behaviour.compiled.graphs == 1
    undo()


class Weighted(Stack):
    """Multiplies by a matrix of the call, too."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.linear(x, weight))


@torch.no_grad()
def test_a_weight_that_comes_with_the_call_is_not_packed():
    model, x = Weighted().eval(), torch.randn(2, 9, WIDTH)
    first, other = torch.randn(WIDTH, WIDTH), torch.randn(WIDTH, WIDTH)
    behaviour, space, undo = applied(Inductor, model, offered(model, x, first))
    for weight in (first, other):
        assert relative(space.forward(x, weight), model(x, weight)) < 1e-5
    assert len(behaviour.compiled.graph_pass.packed.packed) == 2 + 4 * 6
    undo()


OUTSIDE = torch.randn(WIDTH, WIDTH)


class Unregistered(Stack):
    """Multiplies by tensors that no module has registered, and by one that it writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.held = [torch.randn(WIDTH, WIDTH)]
        self.register_buffer("moving", torch.randn(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.moving.mul_(0.5)
        for weight in (self.held[0], OUTSIDE, self.moving):
            x = nn.functional.linear(x, weight)
        return super().forward(x)


@torch.no_grad()
def test_weights_that_nothing_watches_or_the_call_writes_are_not_packed():
    model, x = Unregistered().eval(), torch.randn(2, 9, WIDTH)
    behaviour, space, undo = applied(Inductor, model, offered(model, x))
    kept = model.moving.clone()
    space.forward(x)  # the first call compiles and runs
    for change in (lambda: None, lambda: model.held[0].mul_(2), lambda: OUTSIDE.mul_(3)):
        change()
        model.moving.copy_(kept)
        mine = space.forward(x)
        model.moving.copy_(kept)
        assert relative(mine, model(x)) < 1e-5
    assert len(behaviour.compiled.graph_pass.packed.packed) == 2 + 4 * 6
    undo()


@torch.no_grad()
def test_under_autocast_float32_weights_are_left_alone():
    model, x = Stack().eval(), torch.randn(2, 9, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        behaviour, space, undo = applied(Inductor, model, offered(model, x))
        assert relative(space.forward(x), model(x)) < 2e-2
    assert not behaviour.compiled.graph_pass.packed.packed
    undo()


@torch.no_grad()
def test_a_weight_is_packed_once_for_all_graphs():
    model = Stack().eval()
    behaviour, space, undo = applied(Inductor, model, offered(model, torch.randn(2, 9, WIDTH)))
    for x in (torch.randn(2, 9, WIDTH), torch.randn(3, 6, WIDTH)):
        assert relative(space.forward(x), model(x)) < 1e-6
    assert behaviour.compiled.graphs == 2
    assert len(behaviour.compiled.graph_pass.packed.packed) == 2 + 4 * 6
    undo()


@torch.no_grad()
def test_copies_die_with_the_compiled_forward():
    model, x = Stack().eval(), torch.randn(2, 9, WIDTH)
    behaviour, space, undo = applied(Inductor, model, offered(model, x))
    space.forward(x)
    copies = [weakref.ref(each) for each in behaviour.compiled.graph_pass.packed.packed]
    assert copies and all(copy() is not None for copy in copies)
    undo()
    del behaviour, undo, space
    gc.collect()
    assert not any(copy() is not None for copy in copies)


@torch.no_grad()
def test_float32_weights_are_left_to_eagers_library_where_that_is_faster():
    model, x = Stack(2).eval(), torch.randn(2, 9, WIDTH)
    packing = PackedWeights(model, float32=False)
    forward = CompiledForward(model.forward, backend="eager", graph_pass=packing)
    assert torch.equal(forward(x), model(x)) and not packing.packed
    forward.dispose()


def test_it_is_offered_where_most_of_a_model_is_repeated():
    model, x = Stack(8), torch.randn(2, 9, WIDTH)
    share = repeated_share(model, repeated_blocks(model))
    assert share == pytest.approx(7 * 5 / (2 + 8 * 5))
    observation = observe(model.eval(), x)
    offer = offered(model, x)
    whole = {v.name: v for v in variants(Inductor(), observation)}["frozen"]
    assert offer.setup_seconds == compile_seconds(observation, share) < 0.75 * whole.setup_seconds
    assert 0.8 * whole.predicted_gain < offer.predicted_gain < whole.predicted_gain
    assert offered(Stack(1), x) is None


class RepeatedAlone:
    @kpt.hookimpl
    def kpt_passes(self):
        yield PassSpec("inductor", "compile", "few_variants:Repeated")


def test_optimised_it_follows_the_weights_and_is_undone():
    torch.manual_seed(4)
    model, x = Stack(10).eval(), torch.randn(8, 32, WIDTH)
    state = {name: value.clone() for name, value in model.state_dict().items()}

    kpt.optimize(model, (x,), level="exact", plugins=[RepeatedAlone()], budget=60, cache=False)
    receipt = kpt.report(model)
    found = {entry.name: entry.rule for entry in (*receipt.accepted, *receipt.rejected)}
    assert found["inductor:repeated blocks"] in ("ok", "slower"), found
    with torch.no_grad():
        true = nn.Sequential(model.first, *model.layers, model.head)
        assert relative(model(x), true(x)) < 1e-5
        model.layers[3].back.weight.mul_(2.0)
        assert relative(model(x), true(x)) < 1e-5
    kpt.restore(model)
    state["layers.3.back.weight"] = model.layers[3].back.weight.detach()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
