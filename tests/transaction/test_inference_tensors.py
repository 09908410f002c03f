"""Tensors made in inference mode: no plan may hold copies of them."""

from __future__ import annotations

import copy

import pytest
import torch

import kpt
from slow_models import DerivedScale, DirectScale, net, plugin


@pytest.mark.parametrize("offered", [DirectScale, DerivedScale], ids=["live", "derived"])
def test_weights_made_in_inference_mode_are_never_copied(offered):
    with torch.inference_mode():
        model = net()
    twin, x = copy.deepcopy(model), torch.randn(32, 16)
    kpt.optimize(model, x, plugins=[plugin(offered)], budget=20, cache=False)
    receipt = kpt.report(model)
    assert receipt.optimized is (offered is DirectScale)
    if offered is DerivedScale:
        assert "first.weight was made in inference mode" in receipt.rejected[0].reason
    with torch.inference_mode():
        for each in (model, twin):
            each.slow.weight.mul_(2.0)
        torch.testing.assert_close(model(x), twin(x))


@pytest.mark.parametrize("offered", [DirectScale, DerivedScale], ids=["live", "derived"])
def test_neither_are_plain_attributes_made_in_inference_mode(offered):
    """A table that a first call makes, say."""
    model = net()
    with torch.inference_mode():
        model.slow.table = torch.ones(16)
    kpt.optimize(model, torch.randn(32, 16), plugins=[plugin(offered)], budget=20, cache=False)
    receipt = kpt.report(model)
    assert receipt.optimized is (offered is DirectScale)
    if offered is DerivedScale:
        assert "slow.table was made in inference mode" in receipt.rejected[0].reason


def test_where_nothing_may_be_copied_what_copies_nothing_is_found():
    """However much faster the other is predicted to be, and is."""
    with torch.inference_mode():
        model = net()
    plugins = [plugin(DirectScale), plugin(DerivedScale, phase="compile")]
    kpt.optimize(model, torch.randn(32, 16), plugins=plugins, budget=20, cache=False)
    receipt = kpt.report(model)
    assert [entry.name for entry in receipt.accepted] == ["DirectScale:direct"]
    assert {entry.name: entry.rule for entry in receipt.rejected} == {"DerivedScale:derived": "no-effect"}
