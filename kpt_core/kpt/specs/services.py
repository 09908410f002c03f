"""What stands around an optimised model: export, deployment, tracking, launching, comparing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from kpt.specs.words import Level

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ExporterSpec:
    """Writes an optimised model in another format. ``entry`` names an `Exporter`."""

    name: str
    entry: str
    format: str
    suffix: str = ""


class Exporter(Protocol):
    def export(self, model: torch.nn.Module, example_inputs: Any, path: str) -> str: ...


@dataclass(frozen=True)
class TargetSpec:
    """A place to deploy to. ``entry`` names a `Target`."""

    name: str
    entry: str
    summary: str = ""


class Target(Protocol):
    def plan(self, artifact: str, options: Mapping[str, Any]) -> Mapping[str, Any]: ...

    def apply(self, plan: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]: ...

    def status(self, name: str) -> Mapping[str, Any]: ...

    def destroy(self, name: str) -> Iterable[Mapping[str, Any]]: ...


@dataclass(frozen=True)
class TrackerSpec:
    """Records receipts elsewhere. ``entry`` names a `Tracker`."""

    name: str
    entry: str
    summary: str = ""


class Tracker(Protocol):
    def record(self, receipt: Mapping[str, Any]) -> None:
        """Store one receipt, as `Receipt.to_dict` gives it.

        It is called after the search, whose budget does not count it: where it takes long, the receipt says
        so, and which of torch's flags and of random states it changed, which are put back.
        """


@dataclass(frozen=True)
class LauncherSpec:
    """Starts a job on several processes or machines. ``entry`` names a `Launcher`."""

    name: str
    entry: str
    summary: str = ""


class Launcher(Protocol):
    def command(self, job: Mapping[str, Any]) -> list[str]: ...


@dataclass(frozen=True)
class ContenderSpec:
    """Somebody that ``kpt bench`` compares with. ``entry`` names a `Contender`.

    ``requires`` are importable names; a contender whose names are missing is reported as absent.
    """

    name: str
    entry: str
    requires: tuple[str, ...] = ()
    level: Level = "exact"
    summary: str = ""


class Contender(Protocol):
    def prepare(
        self, model: torch.nn.Module, example: Mapping[str, Any]
    ) -> Callable[[Mapping[str, Any]], Any]:
        """A function that runs one call, given its inputs by name."""
