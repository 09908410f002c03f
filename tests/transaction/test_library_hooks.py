"""Hooks that a library's own code registers."""

from __future__ import annotations

import copy
import importlib
import sys

import pytest
import torch

import kpt
from fingerprints import fast_calls, optimized
from slow_models import DirectScale, plugin

LIBRARY = """
import torch
from torch.nn.utils import prune
from slow_models import net

collected = None

def collect(module, args, output):
    if collected is not None:
        collected.append(output)

def double(module, args, output):
    "A tool for users, which this library registers nowhere."
    heard.append(module)
    return output * 2.0

heard = []

class Collects(torch.nn.Module):
    hooked = False

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x, inner=False):
        global collected
        if inner and not self.hooked:
            self.net.slow.register_forward_hook(collect)
            self.hooked = True
        collected = [] if inner else None
        result, mine = self.net(x), collected
        collected = None
        return result, mine
"""


@pytest.fixture
def library(monkeypatch, tmp_path):
    """A package that is installed, as far as anybody can tell, with a model that hooks its own modules."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "collecting_library.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module("collecting_library")
    sys.modules.pop("collecting_library")


@pytest.mark.parametrize("called_before", [False, True])
def test_hooks_that_a_librarys_forward_registers_belong_to_it(library, called_before):
    model, x = library.Collects().eval(), torch.randn(32, 16)
    twin = copy.deepcopy(model)
    if called_before:
        model(x, inner=True)
    optimized(model, {"x": x, "inner": True}, plugins=[plugin(DirectScale)])
    with torch.no_grad():
        result, collected = model(x, inner=True)
        expected, theirs = twin(x, inner=True)
    assert fast_calls(model) == 1 and len(collected) == 1
    assert torch.equal(result, expected) and torch.equal(collected[0], theirs[0])
    assert bool(model.net.slow._forward_hooks) is called_before


def test_a_users_hook_may_be_a_function_of_the_models_library(library):
    model, x = library.Collects().eval(), torch.randn(32, 16)
    handle = model.net.slow.register_forward_hook(library.double)
    expected = model(x)[0]
    library.heard.clear()
    kpt.optimize(model, x, plugins=[plugin(DirectScale)], budget=20.0, cache=False)
    receipt = kpt.report(model)
    assert not receipt.optimized and "net.slow has a hook (forward_hooks)" in receipt.reason
    assert library.heard == []
    assert torch.equal(model(x)[0], expected) and library.heard == [model.net.slow]
    handle.remove()
    assert kpt.report(optimized(model, x, plugins=[plugin(DirectScale)])).optimized
