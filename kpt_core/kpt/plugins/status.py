"""What the loader says about each plugin, and what it found in those that work."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, get_args

State = Literal["ok", "disabled", "incompatible", "broken", "conflict", "invalid", "hardware-absent"]
STATES: tuple[State, ...] = get_args(State)
ALLOW_VARIABLE = "KPT_PLUGINS"
DENY_VARIABLE = "KPT_DISABLE_PLUGINS"

S = TypeVar("S")


class PluginError(Exception):
    """A plugin, or something that it names, cannot be used. ``mend`` is a command that helps."""

    def __init__(self, message: str, mend: str = "") -> None:
        super().__init__(f"{message} To mend it: {mend}" if mend else message)
        self.message = message
        self.mend = mend


@dataclass(frozen=True)
class PluginStatus:
    """The state of one plugin.

    ``hooks`` are the hooks whose specs are in use: a plugin that is broken in one hook keeps the
    others. ``distribution`` is empty for an object that was handed in directly.
    """

    name: str
    distribution: str = ""
    version: str = ""
    state: State = "ok"
    reason: str = ""
    mend: str = ""
    hooks: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The status as plain JSON values."""
        return {
            "name": self.name,
            "distribution": self.distribution,
            "version": self.version,
            "state": self.state,
            "reason": self.reason,
            "mend": self.mend,
            "hooks": list(self.hooks),
        }


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
        from kpt.plugins.validation import known_hooks

        if hook not in known_hooks():
            raise PluginError(f"There is no hook {hook!r}; the hooks are {', '.join(known_hooks())}.")
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


def normalised(name: str) -> str:
    """``name`` as package indexes compare names: lower case, runs of ``-_.`` as one dash."""
    return re.sub(r"[-_.]+", "-", name).lower()


def names_in(variable: str) -> tuple[str, ...] | None:
    """The comma- or space-separated names in an environment variable; None when it is not set."""
    value = os.environ.get(variable)
    return None if value is None else tuple(name for name in re.split(r"[,\s]+", value) if name)


def one_line(error: BaseException) -> str:
    """The type and the first line of an error, for a status."""
    try:
        text = str(error)
    except BaseException:  # noqa: BLE001 - a hostile __str__ must not defeat the report of its error
        text = "(its message cannot be shown)"
    first = text.strip().splitlines()[0] if text.strip() else ""
    return f"{type(error).__name__}: {first[:300]}" if first else type(error).__name__


def disable_command(name: str) -> str:
    """The shell command that turns the plugin ``name`` off and keeps earlier choices."""
    names = [*(names_in(DENY_VARIABLE) or ()), name]
    return f"export {DENY_VARIABLE}={shlex.quote(','.join(names))}"


def enable_command(name: str, distribution: str) -> str:
    """The shell command that undoes what the environment says against the plugin ``name``."""
    owns = {normalised(name), normalised(distribution)}
    denied = names_in(DENY_VARIABLE) or ()
    if any(normalised(entry) in owns for entry in denied):
        rest = [entry for entry in denied if normalised(entry) not in owns]
        return f"export {DENY_VARIABLE}={shlex.quote(','.join(rest))}" if rest else f"unset {DENY_VARIABLE}"
    return f"export {ALLOW_VARIABLE}={shlex.quote(','.join([*(names_in(ALLOW_VARIABLE) or ()), name]))}"


def install_command(requirement: str, *options: str) -> str:
    """The pip command for one requirement."""
    return " ".join(["pip install", *options, shlex.quote(requirement)])


def upgrade_or_disable(name: str, distribution: str) -> str:
    """The command for a fault in the plugin's own code, with the way round it as a comment."""
    if not distribution:
        return "remove the object from the list of plugins, or mend its code"
    return f"{install_command(distribution, '--upgrade')}  # or: {disable_command(name)}"
