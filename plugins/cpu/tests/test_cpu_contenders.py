"""Every contender answers like the model, on a copy, for sizes that it was not prepared with."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from kpt.plugins import instantiate
from kpt_plugin_cpu import plugin

SPECS = {spec.name: spec for spec in plugin.kpt_contenders()}
TOLERANCE = {"exact": 1e-4, "production": 3e-2, "aggressive": 1e-1}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))

    def forward(self, x):
        return self.layers(x)


def first(value):
    return (
        value
        if isinstance(value, torch.Tensor)
        else first(next(iter(getattr(value, "values", lambda: value)())))
    )


def _tolerance(level: str) -> float:
    """Other libraries' products of eight-bit numbers saturate on CPUs without VNNI."""
    saturates = level == "aggressive" and not torch.cpu._is_vnni_supported()
    return 0.5 if saturates else TOLERANCE[level]


@pytest.mark.parametrize("name", sorted(SPECS))
def test_contender(name):
    spec = SPECS[name]
    missing = [module for module in spec.requires if find_spec(module) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")
    torch.manual_seed(0)
    model = Model().eval()
    weights = [parameter.clone() for parameter in model.parameters()]
    x = torch.randn(4, 64)
    run = instantiate(spec.entry).prepare(model, {"x": x})
    for _ in range(2):
        x = torch.randn(4, 64)
        with torch.no_grad():
            expected = model(x)
        got = torch.as_tensor(first(run({"x": x}))).float()
        assert float((got - expected).norm() / expected.norm()) < _tolerance(spec.level)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))
    assert all(parameter.dtype is torch.float32 for parameter in model.parameters())
