"""What plugin hooks return, and what the behaviour behind them has to offer.

A *spec* is data: a frozen dataclass of names, numbers and ``"module:attr"`` strings, so that a
plugin module imports nothing heavy. The attribute behind such a string is imported when it is first
used and has to satisfy the `Protocol` named in the spec's field comment.

Nothing here imports torch; types that mention it are strings. There is a module for each kind of thing
that a plugin may offer, and every name is imported from `kpt.specs` itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from kpt.specs.hardware import HardwareProfile, HardwareSpec, Probe
from kpt.specs.models import Adapter, AdapterError, AdapterSpec
from kpt.specs.observation import Observation
from kpt.specs.ops import KernelSetup, KernelSpec, OpSpec, Recogniser, Tuner
from kpt.specs.passes import Pass, PassSpec, PolicySpec, Skip, Undo, Variant, replace_forward
from kpt.specs.services import (
    Contender,
    ContenderSpec,
    Exporter,
    ExporterSpec,
    Launcher,
    LauncherSpec,
    Target,
    TargetSpec,
    Tracker,
    TrackerSpec,
)
from kpt.specs.words import LEVELS, MODES, OBJECTIVES, PHASES, WRAPPING, Level, Mode, Objective, Phase

__all__ = [
    "Adapter",
    "AdapterError",
    "AdapterSpec",
    "Contender",
    "ContenderSpec",
    "Exporter",
    "ExporterSpec",
    "HardwareProfile",
    "HardwareSpec",
    "KernelSetup",
    "KernelSpec",
    "LEVELS",
    "Launcher",
    "LauncherSpec",
    "Level",
    "MODES",
    "Mode",
    "OBJECTIVES",
    "Objective",
    "Observation",
    "OpSpec",
    "PHASES",
    "Pass",
    "PassSpec",
    "Phase",
    "PolicySpec",
    "Probe",
    "Recogniser",
    "SPEC_TYPES",
    "Skip",
    "Target",
    "TargetSpec",
    "Tracker",
    "TrackerSpec",
    "Tuner",
    "Undo",
    "Variant",
    "WRAPPING",
    "replace_forward",
]

#: Every spec type, by the hook that collects it.
SPEC_TYPES: Mapping[str, type] = MappingProxyType(
    {
        "kpt_hardware": HardwareSpec,
        "kpt_ops": OpSpec,
        "kpt_kernels": KernelSpec,
        "kpt_precision_policies": PolicySpec,
        "kpt_passes": PassSpec,
        "kpt_model_adapters": AdapterSpec,
        "kpt_exporters": ExporterSpec,
        "kpt_deploy_targets": TargetSpec,
        "kpt_trackers": TrackerSpec,
        "kpt_launchers": LauncherSpec,
        "kpt_contenders": ContenderSpec,
    }
)
