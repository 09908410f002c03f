"""The pass beside others: what it refuses and says, what stays of it, how it is judged."""

from __future__ import annotations

import gc
import importlib.metadata
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace

import importlib_metadata
import pytest
import torch
from observing import PROFILE, observe
from openvino_cases import applied, mlp, offer, skipped
from torch import nn

import kpt
import slow_models
from fingerprints import fast_calls, optimized
from kpt.plugins import registry
from kpt.specs import HardwareSpec, PassSpec
from kpt.testing import PluginSuite
from kpt.transaction import recipe
from kpt_plugin_cpu import plugin as cpu
from kpt_plugin_openvino import plugin
from kpt_plugin_openvino.lowering import _interrupted_later, lower
from kpt_plugin_openvino.requests import Requests
from kpt_plugin_openvino.whole import OpenVino


@pytest.fixture(autouse=True)
def fixed() -> None:
    torch.manual_seed(0)


@torch.no_grad()
def test_nothing_of_it_stays_after_its_undo(monkeypatch):
    made: list[weakref.ref] = []

    def requests(*given: object, **further: object) -> Requests:
        found = Requests(*given, **further)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr("kpt_plugin_openvino.lowering.Requests", requests)
    model, x = mlp(), torch.randn(8, 16)
    behaviour, space, undo = applied(model, x)
    space.forward(x)
    assert made[0]() is not None
    undo()
    del behaviour, space, undo
    gc.collect()
    assert len(made) == 1 and made[0]() is None


def test_ctrl_c_in_a_conversion_is_heard_after_it():
    done = []
    with pytest.raises(KeyboardInterrupt):
        with _interrupted_later():
            signal.raise_signal(signal.SIGINT)
            done.append(True)
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_it_can_not_take_is_named():
    def refused(function, *inputs: object) -> str:
        with pytest.raises(TypeError) as caught:
            lower(torch.fx.symbolic_trace(function), list(inputs))
        return str(caught.value)

    assert "input 0 of the graph is a tensor of torch.complex64" in refused(
        lambda x: (x * 2,), torch.ones(3, dtype=torch.complex64)
    )
    assert "input 1 of the graph is of type int" in refused(lambda x, n: (x * n,), torch.ones(3), 2)
    assert "output 0 of the graph is of type int" in refused(lambda x: (x.shape[0],), torch.ones(3))
    model, x = nn.Linear(4, 4).eval(), torch.randn(2, 4)
    plain = model.forward
    model.forward = lambda x: plain(x.double().cumsum(0).float())
    undo = OpenVino().apply(model, offer(observe(model, x)))
    with pytest.raises(Exception, match="float64, which OpenVINO has not"), torch.no_grad():
        model.forward(x)
    undo()


def test_reasons_to_skip(monkeypatch):
    model, x = mlp(), torch.randn(8, 16)
    old = replace(PROFILE, native_dtypes=("float32", "float64"))
    assert offer(observe(model, x), old).derives
    assert "the model's are: float64" in skipped(observe(mlp().double(), x.double()))
    assert "are: none" in skipped(observe(nn.ReLU(), x))
    assert "no arithmetic" in skipped(observe(mlp().bfloat16(), x.bfloat16()), old)
    assert "copy of the weights" in skipped(replace(observe(model, x), objective="memory"))
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert "can't be imported" in skipped(observe(model, x))


class Alone:
    """This plugin, and the CPU that it asks for."""

    @kpt.hookimpl
    def kpt_hardware(self) -> Iterator[HardwareSpec]:
        yield from cpu.kpt_hardware()

    @kpt.hookimpl
    def kpt_passes(self) -> Iterator[PassSpec]:
        yield from plugin.kpt_passes()


@torch.library.custom_op("kpt_openvino_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return twice(x) * self.weight


def test_an_operation_that_it_does_not_know_is_a_rejection_that_names_it():
    model, x = Twice().eval(), torch.randn(64, 16)
    kpt.optimize(model, x, plugins=[Alone()], level="exact", budget=60.0, cache=False)
    (entry,) = [e for e in kpt.report(model).rejected if e.name == "openvino:whole"]
    assert "kpt_openvino_tests::twice" in entry.reason, entry
    assert "forward" not in model.__dict__


@torch.no_grad()
def test_what_it_made_serves_no_changed_weights():
    model, x = slow_models.net(), torch.randn(32, 16)
    optimized(model, x, plugins=[Alone()], level="exact", budget=60.0)
    assert [entry.name for entry in kpt.report(model).accepted] == ["openvino:whole"]
    expected = slow_models.net()(x)
    torch.testing.assert_close(model(x), expected)
    assert fast_calls(model) == 1
    model.last.weight.mul_(2.0)
    twin = slow_models.net()
    twin.last.weight.mul_(2.0)
    assert torch.equal(model(x), twin(x)) and fast_calls(model) == 1
    kpt.restore(model)


def test_what_it_made_is_saved_as_a_plan_and_made_again(tmp_path):
    pytest.importorskip("safetensors")
    model, x = slow_models.net(), torch.randn(32, 16)
    optimized(model, x, plugins=[Alone()], level="exact", budget=60.0, dynamic_shapes={"x": {0: "batch"}})
    path = kpt.save(model, tmp_path / "artifact")
    assert not [file for file in path.rglob("*") if file.suffix in (".bin", ".xml", ".pt")]
    again = kpt.load(path, arch="slow_models:net", plugins=[Alone()])
    receipt = kpt.report(again)
    assert [entry.name for entry in receipt.accepted] == ["openvino:whole"] and not receipt.searched
    for rows in (32, 5):
        inputs = torch.randn(rows, 16)
        with torch.no_grad():
            torch.testing.assert_close(again(inputs), slow_models.net()(inputs))
    assert fast_calls(again) == 2


def test_the_key_of_a_recipe_names_the_release_that_compiled(monkeypatch):
    read = importlib.metadata.version
    known = recipe.versions(registry(["cpu", "openvino"]))
    assert known["openvino"] == read("openvino") and "pytest" not in known
    monkeypatch.setattr(
        importlib_metadata, "version", lambda name: "2099.1" if name == "openvino" else read(name)
    )
    assert recipe.versions(registry(["cpu", "openvino"])) == {**known, "openvino": "2099.1"}


def test_signals_are_survived_after_models_that_went_in_the_order_in_which_they_came():
    code = """
import faulthandler, gc, signal, torch
from kpt_plugin_openvino.lowering import lower

faulthandler.enable()  # as Python does with -X faulthandler, and pytest
made = [lower(torch.fx.symbolic_trace(lambda x: (x * 2,)), [torch.ones(3)]) for _ in range(3)]
while made:
    made.pop(0)
    gc.collect()
heard = []
signal.signal(signal.SIGUSR1, lambda *given: heard.append(True))
signal.raise_signal(signal.SIGUSR1)
print("heard", len(heard))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "heard 1"), done.stderr


def test_its_use_is_reported_to_nobody(monkeypatch):
    telemetry = pytest.importorskip("openvino_telemetry")

    def refused(*args: object, **kwargs: object) -> None:
        raise AssertionError("a report of use was begun")

    monkeypatch.setattr(telemetry.Telemetry, "__init__", refused)
    lower(torch.fx.symbolic_trace(lambda x: (x * 2,)), [torch.ones(3)])


class TestPlugin(PluginSuite):
    plugin = plugin
