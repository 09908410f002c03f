"""Random numbers that are the same for every test, and a model of linear layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def fixed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 128)).eval()
