"""What the loader says about each plugin, and the commands that mend it."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from typing import Any, Literal, get_args

from kpt.error_text import message_of

State = Literal["ok", "disabled", "incompatible", "broken", "conflict", "invalid", "hardware-absent"]
STATES: tuple[State, ...] = get_args(State)
ALLOW_VARIABLE = "KPT_PLUGINS"
DENY_VARIABLE = "KPT_DISABLE_PLUGINS"


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


def normalised(name: str) -> str:
    """``name`` as package indexes compare names: lower case, runs of ``-_.`` as one dash."""
    return re.sub(r"[-_.]+", "-", name).lower()


def names_in(variable: str) -> tuple[str, ...] | None:
    """The comma- or space-separated names in an environment variable; None when it is not set."""
    value = os.environ.get(variable)
    return None if value is None else tuple(name for name in re.split(r"[,\s]+", value) if name)


def one_line(error: BaseException) -> str:
    """The type and the first line of an error, for a status."""
    text = message_of(error)
    first = text.splitlines()[0] if text else ""
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
