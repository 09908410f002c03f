"""Writes to what blocks made: they stay in one part, or the graph is not cut."""

from __future__ import annotations

import numpy
import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from kpt.compiling import CompiledForward, RepeatedParts
from repeated_blocks import Block, Model, blocks, compiled, exchange


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
