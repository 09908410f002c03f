"""Models, and the pass applied to them, for the tests of this folder."""

from __future__ import annotations

import torch
from observing import PROFILE, Convolutions, observe
from torch import nn

from kpt.specs import HardwareProfile, Skip, Variant
from kpt.transaction import workspace
from kpt.transaction.observe import Observation
from kpt_plugin_openvino.whole import OpenVino


def offer(observation: Observation, profile: HardwareProfile = PROFILE) -> Variant:
    (found,) = OpenVino().propose(observation, profile)
    assert isinstance(found, Variant), found
    return found


def skipped(observation: Observation, profile: HardwareProfile = PROFILE) -> str:
    (found,) = OpenVino().propose(observation, profile)
    assert isinstance(found, Skip), found
    return found.reason


def applied(model: nn.Module, *example: torch.Tensor, dims=None):
    """(the pass, a workspace of ``model`` with the variant applied, its undo)."""
    behaviour, space = OpenVino(), workspace.clone(model)
    return behaviour, space, behaviour.apply(space, offer(observe(model, example, dynamic_shapes=dims)))


class Net(Convolutions):
    """Returns a dictionary of floats, integers and booleans."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.features(x)
        logits = self.head(x.mean((2, 3)))
        return {"map": x, "logits": logits, "best": logits.argmax(-1), "positive": logits > 0}


def mlp(width: int = 64) -> nn.Module:
    return nn.Sequential(nn.Linear(16, width), nn.GELU(), nn.Linear(width, 4)).eval()
