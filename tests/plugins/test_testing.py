"""The conformance suites: they pass what is right, fail what is wrong, and cannot be weakened."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest import SkipTest

import pytest
import torch

import kpt
from conformance import HOME, failures, outcomes, plugin_of, plugin_suite
from kpt.plugins.validation import CORE_OPS
from kpt.specs import ExporterSpec, HardwareProfile, HardwareSpec, KernelSpec, OpSpec, PassSpec, Skip, Variant
from kpt.testing import KernelSuite, PluginSuite, tiny_models
from kpt.testing.models import op_arguments

# ---------------------------------------------------------------------------------------------
# A suite cannot be weakened


def test_a_standard_test_can_be_neither_deleted_nor_replaced():
    for replacement in (None, lambda self: None):
        with pytest.raises(
            TypeError, match="removes or replaces the standard test test_every_reference_imports"
        ):
            type("TestIt", (PluginSuite,), {"test_every_reference_imports": replacement})
    with pytest.raises(TypeError, match="test_no_standard_test_is_missing"):
        type("TestIt", (PluginSuite,), {"test_no_standard_test_is_missing": lambda self: None})


def test_a_standard_test_that_is_taken_away_later_is_noticed():
    suite = type("TestIt", (PluginSuite,), {"plugin": plugin_of()})
    suite.test_passes_propose = lambda self: None  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="test_passes_propose"):
        suite().test_no_standard_test_is_missing()


def test_a_standard_test_changed_in_the_shipped_class_is_noticed(monkeypatch):
    suite = type("TestIt", (KernelSuite,), {})
    monkeypatch.setattr(KernelSuite, "test_gradients", lambda self: None)
    with pytest.raises(AssertionError, match="test_gradients"):
        suite().test_no_standard_test_is_missing()


def test_own_tests_may_be_added_and_a_suite_may_be_subclassed_again():
    first = type("First", (PluginSuite,), {"plugin": plugin_of(), "test_mine": lambda self: None})
    second = type("Second", (first,), {})
    second().test_no_standard_test_is_missing()


def test_a_known_failure_needs_a_reason_and_ends_when_it_passes():
    with pytest.raises(TypeError, match="needs a reason"):
        type("TestIt", (PluginSuite,), {"known_failures": {"test_passes_propose": " "}})
    with pytest.raises(TypeError, match="the tests are"):
        type("TestIt", (PluginSuite,), {"known_failures": {"test_nothing": "why"}})
    broken = plugin_of(kpt_exporters=[ExporterSpec("e", "not_there_42:x", "txt")])
    known = {"known_failures": {"test_every_reference_imports": "its package is not public yet"}}
    suite = type("TestIt", (PluginSuite,), {"plugin": broken, **known})()
    with pytest.raises(SkipTest, match="not public yet"):
        suite.test_every_reference_imports()
    suite.test_no_standard_test_is_missing()
    sound = type("TestIt", (PluginSuite,), {"plugin": plugin_of(kpt_exporters=[]), **known})()
    with pytest.raises(AssertionError, match="take it out of known_failures"):
        sound.test_every_reference_imports()


def test_pytest_collects_and_skips_as_usual(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import kpt\nfrom kpt.testing import PluginSuite\n"
        "class Mine:\n    @kpt.hookimpl\n    def kpt_exporters(self): return []\n"
        "class TestMine(PluginSuite):\n    plugin = Mine()\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout and "skipped" in done.stdout


# ---------------------------------------------------------------------------------------------
# What PluginSuite finds


class GoodPass:
    """Doubles and halves: an effect that can be seen, and is undone."""

    def propose(self, observation, hardware):
        assert isinstance(hardware, HardwareProfile) and observation.calls
        yield Variant("wrap", predicted_gain=1.1)
        yield Skip("nothing else")

    def apply(self, model, variant):
        self.ran = 0
        inner = model.forward

        def forward(*args, **kwargs):
            self.ran += 1
            return inner(*args, **kwargs)

        model.forward = forward

        def undo():
            del model.forward

        return undo

    def verify_applied(self, model):
        return self.ran > 0


class Raising(GoodPass):
    def propose(self, observation, hardware):
        raise KeyError("census")


class Unapplied(GoodPass):
    def apply(self, model, variant):
        self.ran = 0
        return lambda: None


class Wrong(GoodPass):
    def apply(self, model, variant):
        undo = super().apply(model, variant)
        inner = model.forward
        model.forward = lambda *args, **kwargs: inner(*args, **kwargs) * 1.05
        return undo


class NotUndone(GoodPass):
    def apply(self, model, variant):
        super().apply(model, variant)
        return lambda: None


class WritesWeights(GoodPass):
    def apply(self, model, variant):
        with torch.no_grad():
            next(model.parameters()).mul_(1.0001)
        return super().apply(model, variant)


class NoUndo(GoodPass):
    def apply(self, model, variant):
        super().apply(model, variant)


class Calibrating(GoodPass):
    """Takes what flows through the model from `calibrate`, as a pass that chooses scales does."""

    def calibrate(self, model, variant, run):
        self.seen = []
        handles = [module.register_forward_hook(self._look) for module in model.modules()]
        run()
        for handle in handles:
            handle.remove()

    def _look(self, module, args, output):
        self.seen.append(output)

    def apply(self, model, variant):
        assert self.seen
        return super().apply(model, variant)


class _Around(GoodPass):
    """Does something to what the model gives, or is given."""

    def apply(self, model, variant):
        undo = super().apply(model, variant)
        inner = model.forward
        model.forward = lambda *args, **kwargs: self.around(inner, args, kwargs)
        return undo


class Widens(_Around):
    def around(self, inner, args, kwargs):
        return inner(*args, **kwargs).double()


class WritesInputs(_Around):
    def around(self, inner, args, kwargs):
        output = inner(*args, **kwargs)
        for value in (*args, *kwargs.values()):
            value.add_(1)
        return output


class KeepsOutputs(_Around):
    def around(self, inner, args, kwargs):
        self.last = inner(*args, **kwargs)
        return self.last


class PatchesClass(GoodPass):
    def apply(self, model, variant):
        undo, cls, before = super().apply(model, variant), type(model), type(model).forward
        cls.forward = lambda self, *args, **kwargs: before(self, *args, **kwargs)

        def both():
            undo()
            cls.forward = before

        return both


APPLIED, RULES = "test_passes_work_and_are_undone", "test_passes_keep_the_rules"
PASSES = {
    GoodPass: {},
    Calibrating: {},
    Raising: {"test_passes_propose": "census"},
    Unapplied: {APPLIED: "no effect", RULES: "no-effect"},
    Wrong: {APPLIED: "differs from eager's"},
    NotUndone: {APPLIED: "other modules than before"},
    WritesWeights: {APPLIED: "wrote to", RULES: "parameter-modified"},
    NoUndo: {APPLIED: "expected the function that undoes it", RULES: "apply returned NoneType"},
    Widens: {RULES: "output is torch.float64, eager's torch.float32"},
    WritesInputs: {RULES: "input-modified"},
    KeepsOutputs: {RULES: "is held after the call"},
    PatchesClass: {RULES: "code that all models share"},
}


@pytest.mark.parametrize("behaviour", PASSES, ids=lambda cls: cls.__name__)
def test_passes_are_tried_and_undone(home, behaviour):
    home.Behaviour = behaviour
    suite = plugin_suite(plugin_of(kpt_passes=[PassSpec("p", "runtime", f"{HOME}:Behaviour")]))
    found = failures(suite)
    assert found.keys() == PASSES[behaviour].keys(), found
    for name, text in PASSES[behaviour].items():
        assert text in found[name]


def test_specs_references_and_behaviours_are_checked(home):
    home.Empty = type("Empty", (), {})
    missing = plugin_of(kpt_passes=[PassSpec("p", "layout", f"{HOME}:Gone")])
    assert "Gone" in failures(plugin_suite(missing))["test_every_reference_imports"]
    empty = plugin_of(kpt_exporters=[ExporterSpec("e", f"{HOME}:Empty", "txt")])
    assert failures(plugin_suite(empty)) == {
        "test_behaviours_have_their_methods": f"{HOME}:Empty lacks export"
    }
    invalid = plugin_of(kpt_passes=[PassSpec("p", "layuot", "a:b")])  # type: ignore[arg-type]
    assert "did you mean 'layout'" in failures(plugin_suite(invalid))["test_hooks_and_specs_are_valid"]
    misspelt = plugin_of(kpt_kernels=[KernelSpec("layernorm", "mine.norm", "math:sqrt")])
    assert "did you mean 'layer_norm'" in failures(plugin_suite(misspelt))["test_hooks_and_specs_are_valid"]


def test_an_op_of_the_core_cannot_be_redefined(home):
    plugin = plugin_of(kpt_ops=[OpSpec("rms_norm", "(x)", "math:sqrt"), OpSpec("mine", "(x)", "math:sqrt")])
    text = failures(plugin_suite(plugin))["test_hooks_and_specs_are_valid"]
    assert "'rms_norm' is offered by both kpt-core" in text


def test_the_names_of_the_cores_ops_are_up_to_date():
    from kpt.ops import catalogue

    assert set(CORE_OPS) == set(catalogue())


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (HardwareProfile("x", "cpu"), ""),
        ("no such bus", ""),
        ("", "says why"),
        (None, "returned NoneType"),
        (HardwareProfile("x", "cuda"), "of a cuda device; its spec says cpu"),
    ],
)
def test_probes_are_asked(home, answer, reason):
    home.Probe = type("Probe", (), {"detect": lambda self: answer, "measure": lambda self, profile: profile})
    suite = plugin_suite(plugin_of(kpt_hardware=[HardwareSpec("x", "cpu", f"{HOME}:Probe")]))
    found = outcomes(suite)["test_probes_answer"]
    assert reason in found if reason else found == ""


def test_a_module_that_imports_torch_is_told(install):
    install("kpt-plugin-heavyone", "import torch\n@kpt.hookimpl\ndef kpt_exporters(): return []")
    import kpt_plugin_heavyone  # type: ignore[import-not-found]

    text = failures(plugin_suite(kpt_plugin_heavyone))["test_loads_without_heavy_imports"]
    assert "torch" in text


# ---------------------------------------------------------------------------------------------
# What KernelSuite finds


@pytest.mark.parametrize("op", CORE_OPS)
def test_every_op_has_arguments_that_its_reference_takes(op):
    from kpt.ops import reference

    arguments = op_arguments(op, torch.Generator().manual_seed(0))
    assert arguments is not None
    result = reference(op)(**arguments)
    for tensor in result if isinstance(result, tuple) else (result,):
        assert torch.isfinite(tensor).all()


def test_the_tiny_models_run():
    for model, inputs in tiny_models().values():
        with torch.no_grad():
            output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        assert torch.isfinite(output).all() and not model.training


def test_the_core_never_imports_the_suites():
    folder = Path(kpt.__file__).parent
    names = [".".join(path.relative_to(folder.parent).with_suffix("").parts) for path in folder.rglob("*.py")]
    names = [name.removesuffix(".__init__") for name in names if not name.startswith("kpt.testing")]
    script = (
        f"import sys, importlib\n[importlib.import_module(name) for name in {sorted(names)!r}]\n"
        "print([name for name in sys.modules if name.startswith('kpt.testing')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr[-2000:]
