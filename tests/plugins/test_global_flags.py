"""What plugins change of torch's flags and of random states outside of trials is put back and told."""

from __future__ import annotations

import random

import pytest
import torch

import kpt
from kpt.globalstate import results_kept
from kpt.plugins import registry
from kpt.specs import HardwareSpec

CHANGES = {
    "default dtype": "torch.set_default_dtype(torch.float64)",
    "deterministic algorithms": "torch.use_deterministic_algorithms(True)",
    "gradient mode": "torch.set_grad_enabled(False)",
    "threads": "torch.set_num_threads(torch.get_num_threads() + 1)",
    "float32 matmul precision": "torch.set_float32_matmul_precision('medium')",
    "flushing of denormal numbers": "torch.set_flush_denormal(True)",
    "random state of torch": "torch.manual_seed(3)",
    "random state of Python": "random.seed(3)",
}
CHANGED = pytest.mark.parametrize("name", CHANGES)
IMPORTS = "import random\nimport torch\n"
HOOK = "@kpt.hookimpl\ndef kpt_passes():\n"


@pytest.fixture(autouse=True)
def as_it_was():
    """Puts back what a test that fails has left."""
    with results_kept():
        yield


@CHANGED
def test_by_the_import(install, caplog, name):
    install("kpt-plugin-rude", f"{IMPORTS}{CHANGES[name]}\n{HOOK}    return ()\n")
    with results_kept() as changed:
        registry()
    assert changed == [] and "kpt-plugin-rude (kpt-plugin-rude 1.0) changed" in caplog.text
    assert name in caplog.text and "export KPT_DISABLE_PLUGINS=kpt-plugin-rude" in caplog.text


@CHANGED
def test_by_a_hook(install, caplog, name):
    install("kpt-plugin-rude", f"{IMPORTS}{HOOK}    {CHANGES[name]}\n    return ()\n")
    with results_kept() as changed:
        registry()
    assert changed == [] and "kpt-plugin-rude (kpt-plugin-rude 1.0) changed" in caplog.text
    assert name in caplog.text


class Rude:
    """A plugin that offers a probe."""

    __name__ = "rude"
    line = ""

    @kpt.hookimpl
    def kpt_hardware(self):
        return [HardwareSpec("rude", "cpu", f"{__name__}:RudeProbe")]


class RudeProbe:
    def detect(self):
        exec(Rude.line, {"torch": torch, "random": random})
        return "there is none"


@CHANGED
def test_by_a_probe_and_the_run_goes_on_as_without(monkeypatch, caplog, name):
    monkeypatch.setattr(Rude, "line", CHANGES[name])
    model, example = torch.nn.Linear(2, 2).eval(), torch.randn(1, 2)
    with results_kept() as changed:
        kpt.optimize(model, example, plugins=[Rude()], budget=5.0, cache=False)
    assert changed == [] and "inline:rude changed" in caplog.text and "looked for its device" in caplog.text
    assert name in caplog.text
