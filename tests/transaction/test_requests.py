"""What `kpt.optimize` refuses, and what a receipt says."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import fingerprints
import hostile_passes
import kpt
from fingerprints import fast_calls, optimized
from kpt.plugins import PluginError
from slow_models import DerivedScale, DirectScale, net, plugin

PLUGINS = [plugin(DirectScale)]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"level": "fast"}, ValueError, "level='fast'; expected one of exact, production, aggressive"),
        ({"objective": "speed"}, ValueError, "objective='speed'; expected one of latency"),
        ({"budget": 0}, ValueError, "budget=0"),
        ({"budget": float("nan")}, ValueError, "budget=nan"),
        ({"budget": True}, ValueError, "budget=True"),
        ({"fuel": -1}, ValueError, "fuel=-1"),
        ({"accuracy": print}, TypeError, r"expected kpt\.Accuracy"),
        ({"dynamic_shapes": [0]}, TypeError, "dynamic_shapes got list"),
        ({"dynamic_shapes": {"y": {0: "batch"}}}, ValueError, "y"),
        ({"plugins": "cpu"}, TypeError, r"plugins=\['cpu'\]"),
        ({"plugins": ["nonexistent"]}, PluginError, "nonexistent"),
        ({"plugins": 3}, TypeError, "plugins got int"),
        ({"trackers": "mlflow"}, TypeError, "trackers='mlflow'; expected a list"),
        ({"trackers": None}, TypeError, "trackers=None; expected a list"),
        ({"trackers": ["absent"]}, PluginError, "tracker called 'absent'; known are none"),
        ({"trackers": [print]}, TypeError, "trackers holds a builtin_function_or_method"),
        ({"cache": "no"}, TypeError, "cache='no'; expected True or False"),
    ],
)
def test_bad_requests_are_refused_and_nothing_changes(options, error, text):
    model = net()
    before = fingerprints.of_model(model)
    with pytest.raises(error, match=text):
        kpt.optimize(model, torch.randn(32, 16), **{"plugins": PLUGINS, **options})
    assert fingerprints.differences(before, fingerprints.of_model(model)) == []
    with pytest.raises(ValueError, match="was not optimised"):
        kpt.report(model)


def test_something_that_is_no_model():
    with pytest.raises(TypeError, match=r"got function; expected a torch\.nn\.Module"):
        kpt.optimize(lambda x: x, torch.randn(2))
    with pytest.raises(ValueError, match="was not optimised"):
        kpt.refresh(net())


def test_inputs_on_another_device_name_both():
    with pytest.raises(ValueError) as found:
        kpt.optimize(net(), torch.randn(32, 16, device="meta"), plugins=PLUGINS)
    assert "meta" in str(found.value) and "cpu" in str(found.value)


def test_an_example_that_the_model_cannot_run_is_the_users_error():
    model = net()
    before = fingerprints.of_model(model)
    with pytest.raises(RuntimeError) as expected:
        net()(torch.randn(32, 9))
    with pytest.raises(RuntimeError) as found:
        kpt.optimize(model, torch.randn(32, 9), plugins=PLUGINS)
    assert str(found.value) == str(expected.value)
    assert found.value.__notes__[0].startswith(
        "kpt.optimize called Net with example_inputs, and the model raised"
    )
    with pytest.raises(RuntimeError) as found:
        kpt.optimize(model, [torch.randn(32, 16), torch.randn(32, 9)], plugins=PLUGINS)
    assert "example_inputs[1]" in found.value.__notes__[0]
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        kpt.optimize(model, {"y": torch.randn(32, 16)}, plugins=PLUGINS)
    with pytest.raises(ValueError, match="holds no tensor"):
        kpt.optimize(model, {}, plugins=PLUGINS)
    assert fingerprints.differences(before, fingerprints.of_model(model)) == []


@pytest.mark.parametrize(
    "example",
    [
        lambda x: x,
        lambda x: (x,),
        lambda x: {"x": x},
        lambda x: [x, x + 1],
        lambda x: iter([{"x": x}]),
        lambda x: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=32),
    ],
)
def test_every_form_of_examples(example):
    model, x = net(), torch.randn(32, 16)
    optimized(model, example(x), plugins=PLUGINS)
    model(x)
    assert fast_calls(model) == 1


def test_an_endless_iterable_is_read_to_eight_examples():
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield torch.randn(32, 16)

    optimized(net(), endless(), plugins=PLUGINS)
    assert len(taken) <= 9


@pytest.mark.parametrize("fuel", [0, 1, 2])
def test_fuel_limits_how_many_variants_a_plan_holds(fuel):
    model = net()
    kpt.optimize(model, torch.randn(32, 16), plugins=PLUGINS, budget=20.0, cache=False, fuel=fuel)
    assert len(kpt.report(model).accepted) == min(fuel, 1)
    if fuel == 0:
        assert {entry.rule for entry in kpt.report(model).rejected} == {"fuel"}
        assert "beyond the fuel" in kpt.report(model).reason


def test_levels_and_modes_of_a_pass_are_respected():
    model, example = net(), torch.randn(32, 16)
    loose = plugin(DirectScale, level="aggressive")
    kpt.optimize(model, example, plugins=[loose], budget=20.0, cache=False)
    assert "needs level='aggressive'" in kpt.report(model).skipped[0]["reason"]
    optimized(model, example, plugins=[loose], level="aggressive")
    for_training = plugin(DirectScale, modes=("training",))
    kpt.optimize(model, example, plugins=[for_training], budget=20.0, cache=False)
    assert kpt.report(model).skipped[0]["reason"] == "not for inference"


def test_the_receipt_before_and_after_calls():
    model, example = net(), torch.randn(32, 16)
    optimized(model, example, plugins=[plugin(DerivedScale, hostile_passes.OnePercent)])
    receipt = kpt.report(model)
    assert receipt.calls == {"optimized": 0, "fallback": 0, "reasons": {}, "misses": {}}
    model(example)
    model(example[:5])
    calls = kpt.report(model).calls
    assert (calls["optimized"], calls["fallback"]) == (1, 1)
    assert receipt.speedup >= receipt.speedup_low > 1.0
    assert receipt.seconds_before > receipt.seconds_after > 0.0
    assert receipt.break_even_calls is not None and receipt.break_even_calls > 0
    assert receipt.watched_tensors == len(model.state_dict())
    assert receipt.derived_bytes == 2 * 16 * 4
    assert {trial["rule"] for trial in receipt.trials} >= {"ok"}
    data = json.loads(receipt.to_json())
    assert data["optimized"] is True and data["rejected"][0]["rule"] == "value"
    assert kpt.Receipt.from_dict(data).to_dict()["speedup"] == receipt.speedup
    with pytest.raises(ValueError, match="schema"):
        kpt.Receipt.from_dict({**data, "schema": 99})
    assert "faster" in str(receipt) and "OnePercent" in str(receipt)
    assert "<" in receipt._repr_html_()


PUBLIC = {
    "optimize": lambda m: kpt.optimize(m, torch.randn(1, 2)),
    "report": kpt.report,
    "restore": kpt.restore,
    "refresh": kpt.refresh,
    "save": lambda m: kpt.save(m, "nowhere"),
}


@pytest.mark.parametrize("function", PUBLIC)
@pytest.mark.parametrize("value", [None, 5, {"a": 1}])
def test_what_is_no_model_is_named(function, value):
    expected = f"^kpt.{function} got {type(value).__name__}; expected a torch.nn.Module"
    with pytest.raises(TypeError, match=expected):
        PUBLIC[function](value)


@pytest.mark.parametrize("function", PUBLIC)
def test_of_a_class_of_models_one_has_to_be_made_first(function):
    with pytest.raises(TypeError, match=f"^kpt.{function} got the class Linear; make a model of it first"):
        PUBLIC[function](torch.nn.Linear)


def test_trackers_get_the_receipt_and_cannot_harm():
    class Tracker:
        seen: list = []

        def record(self, receipt):
            self.seen.append(receipt)

    class Broken:
        def record(self, receipt):
            raise ConnectionError("no network")

    class Exiting:
        def record(self, receipt):
            sys.exit("no account")

    model, trackers = net(), [Broken(), Exiting(), Tracker()]
    optimized(model, torch.randn(32, 16), plugins=PLUGINS, trackers=trackers)
    assert Tracker.seen[0]["optimized"] is True
    notes = " ".join(kpt.report(model).notes)
    assert "no network" in notes and "no account" in notes


def test_unsuitable_models_come_back_with_a_reason():
    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = net(), 0

        def forward(self, x):
            self.calls += 1
            return self.net(x)

    compiled = net()
    compiled.compile(backend="eager")
    for model, text in (
        (torch.jit.script(torch.nn.Linear(16, 4)).eval(), "scripted"),
        (compiled, "model.compile() was called"),
        (Counting().eval(), "calls on every call"),
    ):
        assert kpt.optimize(model, torch.randn(32, 16), plugins=PLUGINS, budget=20.0) is model
        assert text in kpt.report(model).reason
    assert model.calls == 0
    assert "model.compile() was called" in kpt.report(kpt.optimize(compiled, plugins=PLUGINS)).reason
    compiled._compiled_call_impl = None
    optimized(compiled, torch.randn(32, 16), plugins=PLUGINS)


def test_importing_kpt_is_light():
    code = "import sys, kpt; assert 'torch' not in sys.modules; print(kpt.__version__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == kpt.__version__


def test_operations_that_torch_cannot_count_fail_nothing(monkeypatch):
    """A formula of the FLOP counter that refuses what its op computes only leaves the count unknown."""
    from torch.utils import flop_counter

    def refuse(*args, **kwargs):
        raise AssertionError("query/key/value shapes are incompatible")

    monkeypatch.setattr(flop_counter.FlopCounterMode, "_count_flops", refuse)
    model = torch.nn.Linear(8, 8).eval()
    assert kpt.optimize(model, torch.randn(2, 8), budget=3.0, cache=False) is model
