"""What the loader found in the plugins that work: every spec, and where it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from kpt.plugins.status import PluginError, PluginStatus, normalised
from kpt.specs import SPEC_TYPES

S = TypeVar("S")


@dataclass(frozen=True)
class Registered(Generic[S]):
    """A spec and where it comes from."""

    spec: S
    plugin: str
    distribution: str
    version: str

    @property
    def owner(self) -> str:
        """The plugin, with its distribution where it has one, for messages."""
        return f"{self.plugin} ({self.distribution} {self.version})" if self.distribution else self.plugin


class Registry:
    """The specs of every plugin that works, and the status of every plugin that was found."""

    def __init__(
        self,
        statuses: Iterable[PluginStatus],
        specs: Mapping[str, Iterable[Registered[Any]]],
        stamps: Mapping[str, str] | None = None,
    ) -> None:
        self.statuses: tuple[PluginStatus, ...] = tuple(statuses)
        self._specs = {hook: tuple(found) for hook, found in specs.items()}
        self._stamps = dict(stamps or {})

    def specs(self, hook: str) -> tuple[Registered[Any], ...]:
        """The specs that ``hook`` collected, for instance ``specs("kpt_passes")``."""
        if hook not in SPEC_TYPES:
            raise PluginError(f"There is no hook {hook!r}; the hooks are {', '.join(SPEC_TYPES)}.")
        return self._specs.get(hook, ())

    def status(self, name: str) -> PluginStatus | None:
        """The status of the plugin ``name``: the one in use if several share the name."""
        found = [status for status in self.statuses if normalised(status.name) == normalised(name)]
        found.sort(key=lambda status: not status.hooks)
        return found[0] if found else None

    def fingerprint(self) -> dict[str, str]:
        """The version of each plugin whose specs are in use; part of the recipe cache's key.

        The version of a plugin that its author may be editing ends in a stamp of its source files.
        """
        return {
            status.name: "+".join(filter(None, (status.version, self._stamps.get(status.name))))
            for status in self.statuses
            if status.hooks
        }

    def __repr__(self) -> str:
        found = ", ".join(f"{status.name}: {status.state}" for status in self.statuses)
        return f"Registry({found})"
