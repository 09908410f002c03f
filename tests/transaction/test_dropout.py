"""The rate of dropout, by how much the results of one call vary from seed to seed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kpt
from kpt.specs import PassSpec


class OnlyLoss(nn.Module):
    """What libraries for training return: one number, of which eight seeds say hardly anything."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(16, 64), nn.Dropout(0.1), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(torch.relu(self.first(x)))).square().mean()


def rules(kind: str) -> set[str]:
    class Plugin:
        @kpt.hookimpl
        def kpt_passes(self):
            yield PassSpec("rate", "kernels", f"dropout_passes:{kind}", modes=("training",))

    model = OnlyLoss().train()
    kpt.optimize(model, torch.randn(32, 16), plugins=[Plugin()], budget=20.0, cache=False)
    receipt = kpt.report(model)
    assert receipt.accepted or receipt.rejected, receipt
    kpt.restore(model)
    return {entry.rule for entry in (*receipt.accepted, *receipt.rejected)}


@pytest.mark.parametrize("seed", range(5))
def test_a_right_plan_of_a_model_that_returns_its_loss_is_never_refused_for_the_spread_of_it(seed):
    torch.manual_seed(seed)
    assert rules("Rate") <= {"slower", "kept", "ok"}


@pytest.mark.parametrize("seed", range(3))
def test_another_rate_is_seen_in_the_gradients_where_the_output_is_one_number(seed):
    torch.manual_seed(seed)
    assert rules("Thrice") == {"dropout"}
