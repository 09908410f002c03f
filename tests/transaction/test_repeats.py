"""Forwards of which a second run differs from the first: a backward must not run them again."""

from __future__ import annotations

import random
import re

import numpy
import pytest
import torch

import kpt
from fingerprints import fallbacks, fast_calls, optimized
from kpt.judge.calls import Call
from kpt.judge.state import ModelState
from kpt.transaction.execution import Runner
from kpt.transaction.repeatable import unrepeatable
from kpt.transaction.safekeeping import ModelDamaged, Safekeeping
from slow_models import DirectScale, SlowScale, plugin

CALLS = 0
GENERATOR = torch.Generator()
DICE = random.Random()


class Around(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slow = SlowScale(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.slow(x)


class TakesTheMaximum(Around):
    """Writes to a buffer what has a history where gradients are recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("longest", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.longest.copy_(torch.maximum(self.longest.clone(), x.abs().max()))
        return self.slow(x) * self.longest


class HasSeenMore(TakesTheMaximum):
    """No example moves its maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.longest.fill_(1e3)


class Mean(TakesTheMaximum):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.slow(x)
        self.longest.mul_(0.5).add_(y.mean())
        return y * self.longest


class InAnAttribute(TakesTheMaximum):
    def __init__(self) -> None:
        super().__init__()
        longest = self.longest
        del self.longest
        self.longest = longest


class OfAView(TakesTheMaximum):
    def __init__(self) -> None:
        super().__init__()
        self.longest = torch.zeros(2)[0]


class Counts(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        global CALLS
        CALLS += 1
        return self.slow(x)


class DrawsOfAGlobal(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.slow(x) * (1.0 + torch.rand(x.shape, generator=GENERATOR))


class DrawsOfItsOwn(Around):
    def __init__(self) -> None:
        super().__init__()
        self.drawing = [torch.Generator()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.slow(x) * (1.0 + torch.empty_like(x).uniform_(generator=self.drawing[0]))


class DrawsInVain(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.slow(x) + 0.0 * torch.rand(x.shape, generator=GENERATOR)


class ThrowsDice(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.slow(x) * DICE.random()


class NumbersOfNumPys(Around):
    """Draws from generators of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.old, self.new = numpy.random.RandomState(0), numpy.random.default_rng(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.slow(x) * (self.old.rand() + self.new.random())


class DrawsTheSame(Around):
    """Each call makes and seeds a generator."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.slow(x) * torch.rand(x.shape, generator=torch.Generator().manual_seed(3))


def made(cls: type[Around]) -> Around:
    torch.manual_seed(0)
    return cls().eval()


def reset() -> None:
    global CALLS
    CALLS = 0
    GENERATOR.manual_seed(0)
    DICE.seed(0)


@pytest.mark.parametrize(
    ("cls", "what"),
    [
        (TakesTheMaximum, "writes to the buffer longest"),
        (HasSeenMore, "writes to the buffer longest"),
        (OfAView, "writes to the buffer longest"),
        (Counts, "changes CALLS"),
        (DrawsInVain, "draws random numbers"),
    ],
)
def test_what_a_second_run_would_change_is_left_to_the_original_where_gradients_are_on(cls, what):
    model, twin = made(cls), made(cls)
    x = torch.randn(8, 16)
    optimized(model, x, plugins=[plugin(DirectScale)])
    assert not any(buffer.requires_grad for buffer in model.buffers())
    for (name, mine), true in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, true), name
    seen = []
    for each in (model, twin):
        reset()
        given = x.clone().requires_grad_()
        output = each(given)
        output.sum().backward()
        seen.append((output.detach(), given.grad, torch.tensor(CALLS)))
    for mine, true in zip(*seen, strict=True):
        torch.testing.assert_close(mine, true)
    reasons = fallbacks(model)
    assert len(reasons) == 1 and next(iter(reasons)).endswith(f"the forward {what}"), reasons


@pytest.mark.parametrize(
    ("cls", "what"),
    [
        (Around, ""),
        (InAnAttribute, "writes to the tensor longest"),
        (DrawsOfAGlobal, "draws random numbers"),
        (DrawsOfItsOwn, "draws random numbers"),
        (ThrowsDice, "draws random numbers"),
        (NumbersOfNumPys, "draws random numbers"),
        (DrawsTheSame, ""),
    ],
)
def test_in_what_a_second_run_differs(cls, what):
    model = made(cls)
    runner, calls = Runner(model, training=False), [Call((torch.randn(8, 16),), {})]
    assert unrepeatable(runner, model, calls, False) == what
    assert unrepeatable(runner, model, calls, True) == (what or "writes to its inputs")


def test_a_buffer_that_takes_on_a_history_in_training_is_as_it_was():
    model, x = Mean().train(), torch.randn(8, 16)
    with pytest.raises(RuntimeError, match="a second time"):  # of eager's own second step
        kpt.optimize(model, x, plugins=[plugin(DirectScale)], cache=False, budget=10.0)
    assert not model.longest.requires_grad and torch.equal(model.longest, torch.zeros(()))


@pytest.mark.parametrize(("limit", "says"), [(None, "could not be put back (weight"), (0, "too large to be")])
def test_what_could_not_be_put_back_is_called_too_large_only_where_it_was(limit, says):
    model = SlowScale(16)
    kept = Safekeeping(model, ModelState(model, limit_bytes=limit))
    with pytest.raises(ModelDamaged, match=re.escape(says)):
        kept._mend(["weight: values"], lambda: ["weight: values"])


def test_what_a_forward_draws_alike_in_every_run_is_served_with_gradients():
    model, x = DrawsTheSame().eval(), torch.randn(8, 16)
    optimized(model, x, plugins=[plugin(DirectScale)])
    given = x.clone().requires_grad_()
    model(given).sum().backward()
    assert fast_calls(model) == 1 and not fallbacks(model)
