"""Blocks compiled once for all in training: live weights, gradients, dropout, and when it is offered."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from observing import applied, observe, relative, skips, variants

import kpt
from kpt.specs import PassSpec, Variant
from kpt_plugin_cpu.inductor import Inductor, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

WIDTH = 64


class Block(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(WIDTH), nn.Dropout(rate)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.wide, self.back = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(self.norm(x)).chunk(3, dim=-1)
        mixed = torch.softmax(query @ key.transpose(-1, -2) / WIDTH**0.5, dim=-1) @ value
        return x + self.drop(self.back(nn.functional.gelu(self.wide(mixed))))


class Stack(nn.Module):
    def __init__(self, layers: int = 5, rate: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(rate) for _ in range(layers))
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def in_training(model: nn.Module, x: torch.Tensor) -> dict[str, Variant]:
    return {offer.name: offer for offer in variants(Inductor(), observe(model, x, mode="training"))}


def test_it_is_offered_with_live_weights_where_most_of_a_model_is_repeated():
    x = torch.randn(2, 6, WIDTH)
    offers = in_training(Stack().train(), x)
    assert list(offers) == ["live", "repeated blocks"]
    repeated, live = offers["repeated blocks"], offers["live"]
    assert not repeated.derives and repeated.reproducible and not repeated.params["packs"]
    assert repeated.setup_seconds < live.setup_seconds
    assert 1.0 < repeated.predicted_gain < live.predicted_gain
    assert list(in_training(Stack(1).train(), x)) == ["live"]


def test_blocks_that_move_running_statistics_are_not_cut_in_training():
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)) for _ in range(5)]
    model, x = nn.Sequential(*blocks).train(), torch.randn(6, WIDTH)
    assert list(in_training(model, x)) == ["live"]
    assert "running statistics" in " ".join(skips(Inductor(), observe(model, x, mode="training")))
    for block in blocks:
        block[1].eval()  # fine-tuning with frozen statistics
    assert "repeated blocks" in in_training(model, x)


def test_gradients_are_eagers_in_every_layer_and_weights_are_read_at_each_call():
    torch.manual_seed(0)
    model, x = Stack().train(), torch.randn(2, 6, WIDTH)
    behaviour, space, undo = applied(Inductor, model, in_training(model, x)["repeated blocks"])
    parameters = list(model.parameters())
    for _ in range(2):
        expected = torch.autograd.grad(model(x).square().sum(), parameters)
        loss = space.forward(x).square().sum()
        for retained in (True, False):
            found = torch.autograd.grad(loss, parameters, retain_graph=retained)
            assert all(relative(mine, theirs) < 1e-5 for mine, theirs in zip(found, expected))
        with torch.no_grad():
            for parameter, gradient in zip(parameters, expected):
                parameter -= 0.01 * gradient
    assert behaviour.verify_applied(space)
    assert behaviour.repeated.parts >= 5 and behaviour.repeated.distinct <= 3
    undo()
    assert "forward" not in space.__dict__


def test_each_layer_and_each_call_drops_other_elements():
    torch.manual_seed(0)
    model, x = Stack(rate=0.5).train(), torch.randn(2, 6, WIDTH)
    seen: list[torch.Tensor] = []
    _, space, undo = applied(Inductor, model, in_training(model, x)["repeated blocks"])
    for _ in range(2):
        # A bias has no gradient where its element was dropped in each row.
        seen += torch.autograd.grad(space.forward(x[:1, :1]).sum(), [b.back.bias for b in model.layers])
    patterns = {tuple((gradient == 0.0).tolist()) for gradient in seen}
    assert len(patterns) == len(seen) and all(0.2 < sum(p) / len(p) < 0.8 for p in patterns)
    kept = torch.stack([space.forward(x) for _ in range(200)]).mean(0)
    undo()
    eager = torch.stack([model(x) for _ in range(200)]).mean(0)
    assert relative(kept, eager) < 0.2


class RepeatedOnly:
    @kpt.hookimpl
    def kpt_passes(self):
        yield PassSpec("inductor", "compile", "few_variants:Repeated", modes=("training",))


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_a_training_step_is_proven_optimised_follows_its_optimiser_and_is_undone(rate: float):
    torch.manual_seed(4)
    model, x = Stack(8, rate).train(), torch.randn(16, 32, WIDTH)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = kpt.optimize(model, x, plugins=[RepeatedOnly()], cache=False, budget=120.0)
    report = kpt.report(made)
    tried = {entry.name: entry.rule for entry in (*report.accepted, *report.rejected)}
    assert tried["inductor:repeated blocks"] in ("kept", "slower"), report
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if report.accepted:
        optimiser = torch.optim.SGD(made.parameters(), lr=1e-3)
        first = made(x).square().mean()
        for _ in range(3):
            optimiser.zero_grad()
            made(x).square().mean().backward()
            optimiser.step()
        assert made(x).square().mean() < first + 0.1
        assert kpt.report(made).calls["optimized"] >= 5
    kpt.restore(made)


class SkippedBlocks(Stack):
    """Stochastic depth: what is drawn in the forward, beside dropout, decides what a step computes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            keep = torch.rand(x.shape[0], 1, 1) < 0.8
            x = torch.where(keep, layer(x), x)
        return self.head(x)


class LiveOnly:
    @kpt.hookimpl
    def kpt_passes(self):
        yield PassSpec("inductor", "compile", "few_variants:Live", modes=("training",))


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_a_training_step_that_samples_draws_eagers_numbers(rate: float):
    torch.manual_seed(4)
    model, x = SkippedBlocks(2, rate).train(), torch.randn(16, 32, WIDTH)
    kpt.optimize(model, x, plugins=[LiveOnly()], cache=False, budget=120.0)
    report = kpt.report(model)
    tried = {entry.name: entry.rule for entry in (*report.accepted, *report.rejected)}
    assert tried["inductor:live"] in ("kept", "slower"), report
    kpt.restore(model)
