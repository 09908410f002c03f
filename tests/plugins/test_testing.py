"""The conformance suites: they pass what is right, fail what is wrong, and cannot be weakened."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from unittest import SkipTest

import pytest
import torch

import kpt
from kpt.plugins.validation import CORE_OPS
from kpt.specs import ExporterSpec, HardwareProfile, HardwareSpec, KernelSpec, OpSpec, PassSpec, Skip, Variant
from kpt.testing import KernelSuite, PluginSuite, Suite, tiny_models
from kpt.testing.models import op_arguments
from kpt.testing.suite import standard_tests

HOME = "kpt_test_conformance"


@pytest.fixture
def home(monkeypatch):
    """A module that references can point to."""
    module = types.ModuleType(HOME)
    monkeypatch.setitem(sys.modules, HOME, module)
    return module


def plugin_of(**hooks):
    """A plugin object whose hooks return the given specs."""
    members = {name: kpt.hookimpl(_returning(specs, name)) for name, specs in hooks.items()}
    return type("Plugin", (), members)()


def _returning(specs, name):
    def hook(self):
        return specs

    hook.__name__ = name
    return hook


def outcomes(suite: Suite) -> dict[str, str]:
    """What each standard test says: "" where it passes, "-" where it is skipped, or the failure."""
    said = {}
    for name, _ in standard_tests(type(suite)):
        try:
            getattr(suite, name)()
            said[name] = ""
        except SkipTest:
            said[name] = "-"
        except Exception as error:  # noqa: BLE001 - whatever a standard test raises is its failure
            said[name] = str(error)
    return said


def failures(suite: Suite) -> dict[str, str]:
    return {name: text for name, text in outcomes(suite).items() if text not in ("", "-")}


def plugin_suite(plugin: object) -> Suite:
    return type("TestIt", (PluginSuite,), {"plugin": plugin})()


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


def right(x, dim=-1):
    return torch.softmax(x, dim)


def one_percent_off(x, dim=-1):
    return torch.softmax(x, dim) * 1.01


def even_only(x, dim=-1):
    y = torch.softmax(x, dim)
    return y if x.shape[-2] % 2 == 0 else y * 1.1


def contiguous_only(x, dim=-1):
    y = torch.softmax(x, dim)
    return y if x.is_contiguous() else y * 1.1


def modifies(x, dim=-1):
    y = torch.softmax(x, dim)
    x.detach().add_(1.0)
    return y


def overflows(x, dim=-1):
    e = x.exp()
    e = torch.where(x.abs() > 20, torch.full_like(e, float("nan")), e)
    return e / e.sum(dim, keepdim=True)


def partly_written(x, dim=-1):
    y = torch.empty(x.shape, dtype=x.dtype)
    y[..., 1:] = torch.softmax(x, dim)[..., 1:]
    y[..., :1] = torch.where(torch.isnan(y[..., :1]), y[..., :1], torch.softmax(x, dim)[..., :1])
    return y


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim):
        y = torch.softmax(x, dim)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return gradient * y, None


def wrong_gradient(x, dim=-1):
    return _WrongGradient.apply(x, dim)


def ignores_dim(x, dim=-1):
    return torch.softmax(x, -1)


def refuses_other_dims(x, dim=-1):
    if dim not in (-1, x.dim() - 1):
        raise ValueError(f"dim is {dim}; supported: the last one")
    return torch.softmax(x, dim)


def breaks_on_other_dims(x, dim=-1):
    """By an error as a kernel's launch raises it: nobody meant to refuse."""
    if dim not in (-1, x.dim() - 1):
        raise RuntimeError("invalid configuration argument")
    return torch.softmax(x, dim)


KERNELS = {
    right: set(),
    breaks_on_other_dims: {"test_other_arguments"},
    ignores_dim: {"test_other_arguments"},
    refuses_other_dims: set(),
    one_percent_off: {"test_values"},
    even_only: {"test_odd_sizes"},
    contiguous_only: {"test_strides"},
    modifies: {"test_values"},
    overflows: {"test_small_and_large_values"},
    wrong_gradient: {"test_gradients"},
}


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda function: function.__name__)
def test_kernels_are_judged(home, kernel):
    home.kernel = kernel
    spec = KernelSpec("softmax", "k", f"{HOME}:kernel", backward=True, reproducible=True)
    suite = type("TestIt", (KernelSuite,), {"kernel": spec})()
    found = failures(suite)
    # A kernel that is wrong at once fails wherever it is called; the first test says why.
    assert KERNELS[kernel] <= set(found), found
    if not KERNELS[kernel] or "test_values" not in KERNELS[kernel]:
        assert set(found) <= KERNELS[kernel] | {"test_gradients", "test_random_sizes"}, found


def test_a_kernel_that_prepares_sites_is_judged_on_one(home):
    def packed(factor):
        def setup(site):
            weights = site.weights()
            matrix = (weights["weight"] * factor).detach().clone()

            def run(x, weight, bias=None):
                return torch.nn.functional.linear(x, matrix.to(x.dtype), bias)

            return run

        return setup

    def linear(x, weight, bias=None):
        return torch.nn.functional.linear(x, weight, bias)

    home.entry = linear
    spec = KernelSpec(
        "linear", "packed", f"{HOME}:entry", setup=f"{HOME}:setup", dtypes=("float32", "bfloat16")
    )
    suite = type("TestIt", (KernelSuite,), {"kernel": spec})()
    home.setup = packed(1.0)
    assert not failures(suite)
    assert outcomes(suite)["test_values"] == ""
    home.setup = packed(1.01)
    assert failures(suite)["test_values"].startswith("linear/packed in torch.float32: value")


def test_a_kernel_that_refuses_the_typical_site_is_skipped(home):
    home.kernel, home.supports = right, lambda site: "only for sequences above 4096"
    spec = KernelSpec("softmax", "k", f"{HOME}:kernel", supports=f"{HOME}:supports")
    suite = type("TestIt", (KernelSuite,), {"kernel": spec})()
    with pytest.raises(SkipTest, match="above 4096"):
        suite.test_values()


def test_plugin_suite_judges_kernels_of_known_ops(home):
    home.kernel = one_percent_off
    plugin = plugin_of(kpt_kernels=[KernelSpec("softmax", "k", f"{HOME}:kernel")])
    found = failures(plugin_suite(plugin))
    assert set(found) == {"test_kernels_equal_their_references"}
    assert found["test_kernels_equal_their_references"].startswith("softmax/k in torch.float32: value")


@pytest.mark.parametrize("op", CORE_OPS)
def test_every_op_has_arguments_that_its_reference_takes(op):
    from kpt.ops import reference

    arguments = op_arguments(op, torch.Generator().manual_seed(0))
    assert arguments is not None
    result = reference(op)(**arguments)
    for tensor in result if isinstance(result, tuple) else (result,):
        assert torch.isfinite(tensor).all()


def test_references_themselves_pass_as_kernels():
    for op in CORE_OPS:
        suite = type(
            "TestReference",
            (KernelSuite,),
            {"kernel": KernelSpec(op, "reference", "math:sqrt"), "run": KernelSuite.reference},
        )()
        assert not failures(suite), op


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


@pytest.mark.parametrize("refused", [True, False])
def test_other_arguments_are_not_asked_for_where_supports_refuses_them(home, refused):
    """A norm that adds nothing to its weight: right for all sites that it says it takes."""
    home.kernel = lambda x, weight=None, eps=1e-6, offset=0.0: torch.rms_norm(x, x.shape[-1:], weight, eps)
    home.supports = lambda site: "an offset" if refused and float(site.weights().get("offset", 0.0)) else None
    spec = KernelSpec("rms_norm", "k", f"{HOME}:kernel", supports=f"{HOME}:supports")
    found = failures(type("TestIt", (KernelSuite,), {"kernel": spec})())
    assert set(found) == (set() if refused else {"test_other_arguments"}), found
    assert refused or "with another offset: value" in found["test_other_arguments"]
