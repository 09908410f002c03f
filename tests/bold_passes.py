"""A cautious precision policy that takes its time, and bold ones that promise more."""

from __future__ import annotations

import time
import types
from collections.abc import Iterable
from typing import Any

import torch

from kpt.specs import Variant
from mixed_models import Compiled, HalfWide, detour, inner
from slow_models import DirectScale


class Cautious(HalfWide):
    variant = Variant(
        "half", predicted_gain=2.0, sites=(), compute_dtype="bfloat16", derives=True, setup_seconds=2.0
    )

    def apply(self, model: torch.nn.Module, variant: Variant) -> Any:
        time.sleep(2.0)
        return super().apply(model, variant)


class Bold(HalfWide):
    """It never ends."""

    variant = Variant(
        "stuck", predicted_gain=9.0, sites=(), compute_dtype="int8", derives=True, setup_seconds=4.0
    )

    def apply(self, model: torch.nn.Module, variant: Variant) -> Any:
        while True:
            time.sleep(0.01)


#: How `BoldUntilTheCommit` is wrong, by the rule that finds it.
ERRORS: dict[str, float | Exception] = {
    "value": 0.3,
    "failed": ValueError("too long"),
    "memory": RuntimeError("can't allocate memory"),
}


class BoldUntilTheCommit(HalfWide):
    """Faster than the cautious one; right until ``error`` is set: wrong by that share, or raising it."""

    variant = Variant("wobbly", predicted_gain=9.0, sites=(), compute_dtype="int8", derives=True)
    error: float | Exception = 0.0

    def apply(self, model: torch.nn.Module, variant: Variant) -> Any:
        undo = super().apply(model, variant)
        tail = inner(model).tail

        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            if isinstance(BoldUntilTheCommit.error, Exception):
                raise BoldUntilTheCommit.error
            return x * (1.0 + BoldUntilTheCommit.error)

        tail.forward = types.MethodType(forward, tail)

        def undo_both() -> None:
            undo()
            tail.__dict__.pop("forward", None)

        return undo_both


class HalfUntilTheCommit(BoldUntilTheCommit):
    """The same of a stricter level."""

    variant = Variant("wobbly", predicted_gain=9.0, sites=(), compute_dtype="bfloat16", derives=True)


class InterruptedWhenClosed(Cautious):
    """Ctrl-C arrives while it is undone, once a plan was committed."""

    committed = False

    def apply(self, model: torch.nn.Module, variant: Variant) -> Any:
        undo = super().apply(model, variant)

        def undo_and_interrupt() -> None:
            undo()
            if InterruptedWhenClosed.committed:
                InterruptedWhenClosed.committed = False
                raise KeyboardInterrupt

        return undo_and_interrupt


class BoldAndRight(HalfWide):
    """Needs no set-up, and is right."""

    variant = Variant("right", predicted_gain=9.0, sites=(), compute_dtype="int8", derives=True)


class BoldAndWrong(BoldAndRight):
    """Needs no set-up, and is wrong."""

    variant = Variant("wrong", predicted_gain=9.0, sites=(), compute_dtype="int8", derives=True)

    def apply(self, model: torch.nn.Module, variant: Variant) -> Any:
        undo, last = super().apply(model, variant), inner(model).last
        narrow = last.forward
        last.forward = lambda x: 1.5 * narrow(x)
        return undo


class TwoWays(DirectScale):
    """Two variants: what promises more leaves half of the detour, the other one takes all of it out."""

    def propose(self, observation: Any, hardware: Any) -> Iterable[Variant]:
        return [
            Variant("halfway", predicted_gain=5.5, sites=()),
            Variant("all", predicted_gain=5.0, sites=()),
        ]

    def apply(self, model: torch.nn.Module, variant: Variant) -> Any:
        self.left = 2 if variant.name == "halfway" else 0
        return super().apply(model, variant)

    def replacement(self) -> Any:
        left = self.left

        def forward(scale: Any, x: torch.Tensor) -> torch.Tensor:
            x = detour(x, scale.rounds // left if left else 0)
            return x * scale.weight + scale.bias

        return forward


class AtABound(HalfWide):
    """Wrong for the most rows that were declared, which are 64."""

    variant = Variant("bound", predicted_gain=9.0, sites=(), compute_dtype="bfloat16", derives=True)

    def apply(self, model: torch.nn.Module, variant: Variant) -> Any:
        undo, last = super().apply(model, variant), inner(model).last
        right = type(last).forward
        last.forward = types.MethodType(lambda self, x: right(self, x) * (1.5 if len(x) == 64 else 1.0), last)

        def undo_both() -> None:
            undo()
            last.__dict__.pop("forward", None)

        return undo_both


class LongCompiled(Compiled):
    """Announces a long set-up and takes none."""

    variant = Variant("long", predicted_gain=2.0, sites=("",), setup_seconds=6.0)
