"""Plans that leave out an integer input that is the same everywhere in the examples."""

from __future__ import annotations

import pytest
import torch

import kpt
from fingerprints import fast_calls, optimized
from slow_models import DirectScale, SlowScale, fast_forward, plugin


class Flagged(torch.nn.Module):
    """Rows that count, and a kind for each element."""

    def __init__(self, kinds: int = 2) -> None:
        super().__init__()
        self.slow = SlowScale(16)
        self.kinds = torch.nn.Embedding(kinds, 16)

    def forward(self, x, valid=None, kind=None):
        out = self.slow(x)
        if kind is not None:
            out = out + self.kinds(kind)
        return out if valid is None else out * valid[:, None]


class LeavesFlagsOut(DirectScale):
    def apply(self, model, variant):
        undo = super().apply(model, variant)

        def forward(x, valid=None, kind=None):
            out = fast_forward(model.slow, x)
            return out if kind is None else out + model.kinds.weight[0]

        model.forward = forward

        def take_back():
            model.__dict__.pop("forward", None)
            undo()

        return take_back


ROWS = {"valid": torch.ones(32, dtype=torch.int64), "kind": torch.zeros(32, dtype=torch.int64)}


@pytest.mark.parametrize("name", ROWS)
@torch.no_grad()
def test_a_plan_that_leaves_flags_out_is_found(name):
    model = Flagged().eval()
    example = {"x": torch.randn(32, 16), name: ROWS[name]}
    kpt.optimize(model, example, plugins=[plugin(LeavesFlagsOut)], budget=20.0, cache=False)
    (entry,) = kpt.report(model).rejected
    assert entry.rule == "value" and "with other flags" in entry.reason


@pytest.mark.parametrize("name", ROWS)
@torch.no_grad()
def test_one_that_reads_them_is_right(name):
    model = Flagged().eval()
    optimized(model, {"x": torch.randn(32, 16), name: ROWS[name]}, plugins=[plugin(DirectScale)])
    given = {"x": torch.randn(32, 16), name: torch.arange(32) % 2}
    torch.testing.assert_close(model(**given), Flagged.forward(model, **given))
    assert fast_calls(model) == 1


@torch.no_grad()
def test_where_eager_takes_no_others_they_stay_as_they_are():
    """A table of one kind: a 1 is no row of it."""
    model = Flagged(kinds=1).eval()
    optimized(model, {"x": torch.randn(32, 16), "kind": ROWS["kind"]}, plugins=[plugin(LeavesFlagsOut)])
