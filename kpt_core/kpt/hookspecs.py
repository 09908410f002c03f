"""The whole plugin API on one screen.

A plugin is a module (or object) with functions of these names, marked with ``@kpt.hookimpl`` and
named by an entry point in the group ``kpt.plugins``. Every hook is collecting: each implementation
returns an iterable of specs (`kpt.specs`) and all of them count. An implementation may be a
generator; it is consumed inside the loader's isolation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from kpt import specs

PROJECT = "kpt"
ENTRY_POINT_GROUP = "kpt.plugins"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def kpt_hardware() -> Iterable[specs.HardwareSpec]:
    """Devices, and how each is detected without initialising it."""
    return ()


@hookspec
def kpt_ops() -> Iterable[specs.OpSpec]:
    """Ops: a reference, the signature that kernels follow, and how to recognise one."""
    return ()


@hookspec
def kpt_kernels() -> Iterable[specs.KernelSpec]:
    """Kernels: implementations of ops for some hardware, dtypes and shapes."""
    return ()


@hookspec
def kpt_precision_policies() -> Iterable[specs.PolicySpec]:
    """Precision policies: which dtype a model computes and stores in."""
    return ()


@hookspec
def kpt_passes() -> Iterable[specs.PassSpec]:
    """Passes: any other reversible change of a model."""
    return ()


@hookspec
def kpt_model_adapters() -> Iterable[specs.AdapterSpec]:
    """Model adapters: what a model library knows about its own models."""
    return ()


@hookspec
def kpt_exporters() -> Iterable[specs.ExporterSpec]:
    """Exporters: other formats for an optimised model."""
    return ()


@hookspec
def kpt_deploy_targets() -> Iterable[specs.TargetSpec]:
    """Deploy targets: places that serve an artifact."""
    return ()


@hookspec
def kpt_trackers() -> Iterable[specs.TrackerSpec]:
    """Trackers: places that keep receipts."""
    return ()


@hookspec
def kpt_launchers() -> Iterable[specs.LauncherSpec]:
    """Launchers: how a job starts on several processes or machines."""
    return ()


@hookspec
def kpt_contenders() -> Iterable[specs.ContenderSpec]:
    """Contenders: whom ``kpt bench`` compares with."""
    return ()
