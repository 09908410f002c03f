"""Graphs that are cut nowhere: what does not repeat, and blocks that write or address memory otherwise."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from repeated_blocks import Block, Model, compiled


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
