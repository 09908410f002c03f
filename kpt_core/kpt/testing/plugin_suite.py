"""The standard tests of a plugin: what it names exists, works on small models, and is undone."""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import fields
from types import ModuleType
from typing import Any, ClassVar

import torch

from kpt import compiling, profiles
from kpt.judge import outputs
from kpt.judge.calls import Call
from kpt.judge.draws import InputSpec
from kpt.plugins import Registry, instantiate, load, registry
from kpt.plugins.validation import CORE_OPS, is_reference, known_hooks, nearest
from kpt.specs import HardwareProfile, Level
from kpt.testing.kernel_suite import KernelSuite
from kpt.testing.models import tiny_models
from kpt.testing.suite import Suite, skip

_ADAPTERS = "kpt_model_adapters"
#: What the object behind a spec has to offer, by the hook that collects it.
_BEHAVIOUR: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "kpt_hardware": ("probe", ("detect", "measure")),
    "kpt_passes": ("entry", ("propose", "apply", "verify_applied")),
    "kpt_precision_policies": ("entry", ("propose", "apply", "verify_applied")),
    _ADAPTERS: (
        "entry",
        ("matches", "example_inputs", "blocks", "executes", "load", "describe", "build"),
    ),
    "kpt_exporters": ("entry", ("export",)),
    "kpt_deploy_targets": ("entry", ("plan", "apply", "status", "destroy")),
    "kpt_trackers": ("entry", ("record",)),
    "kpt_launchers": ("entry", ("command",)),
    "kpt_contenders": ("entry", ("prepare",)),
}
#: What a variant may change on the tiny models, relative to eager: the referee is stricter, and
#: judges every variant again on the user's model.
_TOLERANCE: Mapping[Level, float] = {"exact": 1e-3, "production": 5e-2, "aggressive": 2e-1}
#: Rules of the referee that say less of a pass than of how small the tiny models are.
_OF_THE_MODEL = ("value", "size", "mask", "slower", "memory", "budget", "deadline")
_SECONDS = 120.0
_LOADING = (
    "import sys; sys.path[:] = {path!r}; import importlib; plugin = importlib.import_module({module!r});"
    "[list(getattr(plugin, hook)()) for hook in {hooks!r} if hasattr(plugin, hook)];"
    "found = [name for name in {heavy!r} if name in sys.modules];"
    "sys.exit('importing the plugin also imports ' + ', '.join(found) if found else 0)"
)


class PluginSuite(Suite, standard=True):
    """Tests ``plugin``, the module or object that the entry point names.

    ``variants_per_pass`` bounds how many variants of a pass are tried on each model; a plugin that
    compiles takes seconds for each. Override `models` to try passes on models that they are for.
    """

    plugin: ClassVar[object]
    heavy: ClassVar[tuple[str, ...]] = (
        "torch",
        "numpy",
        "transformers",
        "boto3",
        "mlflow",
        "onnxruntime",
        "openvino",
    )
    variants_per_pass: ClassVar[int] = 1
    level: ClassVar[Level] = "aggressive"

    def models(self) -> Mapping[str, tuple[torch.nn.Module, Any]]:
        """(model, example inputs) by name."""
        return tiny_models()

    def registry(self) -> Registry:
        """The plugin alone; raises `kpt.plugins.PluginError` where nothing of it works."""
        return registry([type(self).plugin])

    def hardware(self, found: Registry) -> HardwareProfile:
        """The profile that passes propose for: the CPU's, by this plugin's probe or any other."""
        if any(registered.spec.device_type == "cpu" for registered in found.specs("kpt_hardware")):
            return profiles.hardware("cpu", measure=False, registry=found)
        return profiles.hardware("cpu", measure=False)

    # -- what every plugin promises

    def test_loads_without_heavy_imports(self) -> None:
        """Importing the plugin and calling its hooks imports neither torch nor another heavy library."""
        plugin = type(self).plugin
        if not isinstance(plugin, ModuleType):
            raise skip("the plugin is an object, not a module")
        script = _LOADING.format(
            path=sys.path, module=plugin.__name__, hooks=list(known_hooks()), heavy=list(self.heavy)
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr.strip().splitlines()[-1]

    def test_hooks_and_specs_are_valid(self) -> None:
        """Every hook is known, returns specs of its type, nothing raises or clashes; ops of kernels exist."""
        own = self.registry()
        (status,) = [entry for entry in own.statuses if entry.name.startswith("inline:")]
        assert status.state == "ok", status.reason
        offered = {found.spec.name for where in (own, registry()) for found in where.specs("kpt_ops")}
        for kernel in own.specs("kpt_kernels"):
            known = sorted({*CORE_OPS, *offered})
            assert kernel.spec.op in known, (
                f"{kernel.spec.name}: there is no op {kernel.spec.op!r}; {nearest(kernel.spec.op, known)}"
            )

    def test_hooks_return_the_same_twice(self) -> None:
        """Specs are data: they do not depend on how often they are asked for."""
        first, second = self.registry(), self.registry()
        for hook in known_hooks():
            assert first.specs(hook) == second.specs(hook), f"{hook} returned something else the second time"

    def test_every_reference_imports(self) -> None:
        """Every "module:attr" in every spec names something that can be imported."""
        for hook, spec in self._specs():
            if hook == "kpt_contenders" and any(not _importable(name) for name in spec.requires):
                continue
            for field in fields(spec):
                value = getattr(spec, field.name)
                if is_reference(field.name) and value is not None:
                    load(value)

    def test_behaviours_have_their_methods(self) -> None:
        """What a spec names offers the methods of its protocol."""
        for hook, spec in self._specs():
            if hook not in _BEHAVIOUR:
                continue
            field, methods = _BEHAVIOUR[hook]
            if hook == "kpt_contenders" and any(not _importable(name) for name in spec.requires):
                continue
            behaviour = instantiate(getattr(spec, field))
            missing = [name for name in methods if not callable(getattr(behaviour, name, None))]
            assert not missing, f"{getattr(spec, field)} lacks {', '.join(missing)}"

    # -- hardware

    def test_probes_answer(self) -> None:
        """A probe returns a profile or a reason, and measured rates are positive numbers."""
        found = profiles.detect(self.registry())
        if not found:
            raise skip("the plugin has no probes")
        for detection in found:
            assert not detection.broken, detection.reason
            if detection.profile is None:
                assert detection.reason, "a probe that finds nothing says why"
            else:
                kind = detection.registered.spec.device_type
                assert detection.profile.device_type == kind, (
                    f"the profile is of a {detection.profile.device_type}"
                )
                assert profiles.from_dict(profiles.to_dict(detection.profile)).name == detection.profile.name

    # -- model adapters

    def test_adapters_leave_what_is_not_theirs(self) -> None:
        """An adapter does not match a plain module, and neither runs nor loads a folder without a model."""
        adapters = [(spec, instantiate(spec.entry)) for hook, spec in self._specs() if hook == _ADAPTERS]
        if not adapters:
            raise skip("the plugin has no model adapters")
        for spec, adapter in adapters:
            assert not adapter.matches(torch.nn.Linear(2, 2)), f"{spec.name} matches torch's own Linear"
            with tempfile.TemporaryDirectory() as folder:
                executed = adapter.executes(folder)
                assert not executed, f"{spec.name} says that an empty folder executes {executed}"
                found = adapter.load(folder, trust=False)
                assert found is None, f"{spec.name} loads a {type(found).__name__} from an empty folder"

    # -- passes and policies

    def test_passes_propose(self) -> None:
        """Passes propose variants or skips with a reason; nothing raises."""
        self._need_passes()
        for name, observation, found in self._observations():
            proposals = _propose(observation, found)
            raised = [skipped for skipped in proposals.skipped if "raised" in skipped["reason"]]
            assert not raised, f"on {name}: {raised[0]['name']}: {raised[0]['reason']}"
            for candidate in proposals.candidates:
                gain = candidate.variant.predicted_gain
                assert gain > 0, f"on {name}: {candidate.name} predicts a gain of {gain}"

    def test_passes_work_and_are_undone(self) -> None:
        """A variant changes a workspace, leaves parameters alone, has an effect, and is undone."""
        self._need_passes()
        for name, observation, found in self._observations():
            for candidate in self._tried(observation, found):
                where = f"on {name}: {candidate.name}"
                try:
                    _try(candidate, observation, where)
                except AssertionError:
                    raise
                except Exception as error:
                    raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error

    def test_passes_keep_the_rules(self) -> None:
        """The referee refuses at most precision: a variant leaves the model, the process and the
        inputs alone, and what it returns is of eager's form and the caller's own."""
        self._need_passes()
        for name, observation, found in self._observations():
            for candidate in self._tried(observation, found):
                outcome = _judged(candidate, observation)
                assert outcome.right or outcome.rule in _OF_THE_MODEL, (
                    f"on {name}: {candidate.name}: {outcome.rule}: {outcome.reason}"
                )

    # -- kernels

    def test_kernels_equal_their_references(self) -> None:
        """Kernels of catalogued ops for this device, by the standard tests of a kernel."""
        kernels = [spec for hook, spec in self._specs() if hook == "kpt_kernels"]
        tested = 0
        for spec in kernels:
            if spec.hardware and "cpu" not in spec.hardware:
                continue
            suite = type("TestKernel", (KernelSuite,), {"kernel": spec})()
            tested += _run_all(suite)
        if not tested:
            raise skip("no kernel of a catalogued op for this device; test yours with KernelSuite")

    # -- parts

    def _specs(self) -> Iterator[tuple[str, Any]]:
        found = self.registry()
        for hook in known_hooks():
            for registered in found.specs(hook):
                yield hook, registered.spec

    def _tried(self, observation: Any, found: Registry) -> Iterator[Any]:
        """The variants of passes that are tried on one model."""
        tried: dict[str, int] = {}
        for candidate in _propose(observation, found).candidates:
            if candidate.kernel:
                continue
            tried[candidate.source] = tried.get(candidate.source, 0) + 1
            if tried[candidate.source] <= self.variants_per_pass:
                yield candidate

    def _need_passes(self) -> None:
        found = self.registry()
        if not found.specs("kpt_passes") and not found.specs("kpt_precision_policies"):
            raise skip("the plugin has no passes")

    def _observations(self) -> Iterator[tuple[str, Any, Registry]]:
        from kpt.transaction.budget import Budget
        from kpt.transaction.observe import observe, prepare_calls

        found = self.registry()
        for name, (model, inputs) in self.models().items():
            with torch.no_grad():
                calls = prepare_calls(model, inputs)
                observation, _ = observe(
                    model,
                    calls,
                    InputSpec.from_calls(calls, None, model.forward),
                    level=self.level,
                    objective="latency",
                    hardware=self.hardware(found),
                    registry=found,
                    deadline=Budget(_SECONDS),
                )
            yield name, observation, found


def _propose(observation: Any, found: Registry) -> Any:
    from kpt.transaction.propose import propose

    return propose(observation, found)


def _try(candidate: Any, observation: Any, where: str) -> None:
    from kpt.transaction import workspace

    model = observation.model
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}
    space = workspace.clone(model)
    shape = _structure(space)
    behaviour = candidate.make()
    calibrate = getattr(behaviour, "calibrate", None)
    with torch.no_grad(), compiling.collect() as created:
        expected = [call.clone().on(model) for call in observation.calls]
        if calibrate is not None:
            calibrate(space, candidate.variant, lambda: _run_examples(observation, space))
        undo = behaviour.apply(space, candidate.variant)
        assert callable(undo), (
            f"{where}: apply returned {type(undo).__name__}; expected the function that undoes it"
        )
        try:
            found = [call.clone().on(space) for call in observation.calls]
            assert behaviour.verify_applied(space), (
                f"{where}: verify_applied sees no effect after the model ran"
            )
            for call, mine, theirs in zip(observation.calls, found, expected, strict=True):
                masks = observation.spec.padding_masks(call) if candidate.variant.touches_mask else {}
                _compare(mine, theirs, _TOLERANCE[candidate.level], where, masks)
        finally:
            undo()
            for compiled in created:
                compiled.dispose()
        for name, tensor in model.state_dict(keep_vars=True).items():
            assert torch.equal(tensor, before[name]), f"{where}: it wrote to {name}, the user's own tensor"
        for call, theirs in zip(observation.calls, expected, strict=True):
            _compare(_rerun(call, space, where), theirs, 0.0, f"{where}, after it was undone")
    assert _structure(space) == shape, f"{where}: undoing it leaves other modules than before"


def _run_examples(observation: Any, space: torch.nn.Module) -> None:
    for call in observation.calls:
        call.clone().on(space)


def _judged(candidate: Any, observation: Any) -> Any:
    """What a trial of ``candidate`` finds, without timing it."""
    from kpt.judge.state import ModelState
    from kpt.transaction import workspace
    from kpt.transaction.baseline import Baseline
    from kpt.transaction.budget import Budget
    from kpt.transaction.plan import Plan
    from kpt.transaction.trial import Trials

    model = observation.model
    baseline = Baseline(observation, workspace.clone(model), seed=0)
    try:
        trials = Trials(observation, baseline, Budget(_SECONDS), ModelState(model))
        return trials.run(Plan.of([candidate]), timed=False)
    finally:
        baseline.close()


def _rerun(call: Call, space: torch.nn.Module, where: str) -> Any:
    try:
        return call.clone().on(space)
    except RuntimeError as error:
        raise AssertionError(f"{where}: the model fails after it was undone: {error}") from error


def _structure(model: torch.nn.Module) -> list[tuple[str, type, bool]]:
    return [(name, type(module), "forward" in vars(module)) for name, module in model.named_modules()]


def _compare(
    found: Any, expected: Any, tolerance: float, where: str, masks: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Compare all outputs; with ``masks``, only the positions that count."""
    mine, theirs = Call((found,)).tensors(), Call((expected,)).tensors()
    assert mine.keys() == theirs.keys(), (
        f"{where}: the outputs are {', '.join(mine)}, eager's {', '.join(theirs)}"
    )
    for name, tensor in theirs.items():
        other = mine[name]
        assert other.shape == tensor.shape, (
            f"{where}: {name} is {tuple(other.shape)}, eager's {tuple(tensor.shape)}"
        )
        if not tensor.is_floating_point():
            continue
        if masks:
            counting = outputs.mask_for(name, tensor, masks)
            tensor, other = (outputs.select_valid(each, counting) for each in (tensor, other))
        scale = float(tensor.double().norm()) or 1.0
        error = float((other.double() - tensor.double()).norm()) / scale
        assert error <= tolerance, f"{where}: {name} differs from eager's by {error:.1e} of its norm"


def _run_all(suite: KernelSuite) -> int:
    """Run the standard tests of ``suite``; how many were not skipped."""
    from unittest import SkipTest

    from kpt.testing.suite import standard_tests

    ran = 0
    for name, _ in standard_tests(type(suite)):
        try:
            getattr(copy.copy(suite), name)()
            ran += name != "test_spec_is_valid"
        except SkipTest:
            continue
    return ran


def _importable(name: str) -> bool:
    from importlib.util import find_spec

    from kpt.plugins.isolation import attempt

    return attempt(find_spec, name).value is not None
