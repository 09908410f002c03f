"""What the tests of this folder share: observations and profiles made by hand, and parts of the plugin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import kpt
from kpt.judge.calls import as_calls
from kpt.judge.draws import InputSpec
from kpt.specs import HardwareProfile, HardwareSpec, KernelSpec, PassSpec, Skip, Variant
from kpt.transaction import workspace
from kpt.transaction.observe import Observation
from kpt_plugin_cpu import plugin


class Convolutions(torch.nn.Module):
    """Convolutions, a norm and a residual; subclasses say what becomes of the features and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(16)
        self.second = torch.nn.Conv2d(16, 16, 1)
        self.head = torch.nn.Linear(16, 5)
        self.norm.running_mean.normal_()

    def features(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return torch.relu(x + self.second(x))


PROFILE = HardwareProfile(
    name="cpu",
    device_type="cpu",
    compute_units=2,
    bandwidth=2e10,
    matmul_rates={"float32": 1e11, "float32:onednn": 2e11, "bfloat16": 4e11, "int8": 8e11},
    native_dtypes=("float32", "float64", "bfloat16", "int8"),
    details={"usable_cores": 2.0, "physical_cores": 2},
)


def observe(model: torch.nn.Module, examples: Any, **facts: Any) -> Observation:
    """An observation of ``model`` in inference, without running it."""
    calls = as_calls(examples)
    spec = InputSpec.from_calls(calls, facts.pop("dynamic_shapes", None), model.forward)
    defaults: dict[str, Any] = {
        "model": model,
        "calls": tuple(calls),
        "spec": spec,
        "mode": "inference",
        "level": "aggressive",
        "objective": "latency",
        "hardware": PROFILE,
        "device_type": "cpu",
        "parameter_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "parameter_dtypes": frozenset(str(p.dtype).removeprefix("torch.") for p in model.parameters()),
        "baseline_seconds": 1e-2,
        "operations": 5e8,
    }
    return Observation(**{**defaults, **facts})


def variants(behaviour: Any, observation: Observation, profile: HardwareProfile = PROFILE) -> list[Variant]:
    """The variants that are proposed; skips are left out."""
    return [offer for offer in behaviour.propose(observation, profile) if isinstance(offer, Variant)]


def skips(behaviour: Any, observation: Observation, profile: HardwareProfile = PROFILE) -> list[str]:
    """The reasons of all skips."""
    return [offer.reason for offer in behaviour.propose(observation, profile) if isinstance(offer, Skip)]


def applied(kind: type, model: torch.nn.Module, variant: Variant) -> tuple[Any, torch.nn.Module, Any]:
    """(the pass, a workspace of ``model`` with ``variant`` applied, its undo)."""
    behaviour, space = kind(), workspace.clone(model)
    return behaviour, space, behaviour.apply(space, variant)


def relative(output: torch.Tensor, reference: torch.Tensor) -> float:
    """||output - reference|| / ||reference||."""
    return float((output.double() - reference.double()).norm() / reference.double().norm())


class Only:
    """The plugin with one of its passes or kernels ("op/name"): a search without the others ends sooner."""

    def __init__(self, name: str) -> None:
        self.name = name

    @kpt.hookimpl
    def kpt_hardware(self) -> Iterator[HardwareSpec]:
        yield from plugin.kpt_hardware()

    @kpt.hookimpl
    def kpt_kernels(self) -> Iterator[KernelSpec]:
        yield from (spec for spec in plugin.kpt_kernels() if f"{spec.op}/{spec.name}" == self.name)

    @kpt.hookimpl
    def kpt_passes(self) -> Iterator[PassSpec]:
        yield from (spec for spec in plugin.kpt_passes() if spec.name == self.name)
