"""Calls into a plugin's code that cannot take the host down.

A plugin may raise anything while it is imported or called: `SystemExit` from an argument parser,
`OSError` from a missing shared library, a `BaseException` of its own. Everything becomes a value,
except `KeyboardInterrupt`, which is the user's, and `DeadlinePassed`, which ends a whole trial.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Generic, TypeVar

from kpt.interruption import DeadlinePassed
from kpt.plugins.status import PluginError, install_command, one_line

T = TypeVar("T")

_log = logging.getLogger("kpt")

#: ``package.module:attribute.attribute``
REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What a call returned, or what it raised."""

    value: T | None = None
    error: BaseException | None = None


def attempt(call: Callable[..., T], *args: Any, **kwargs: Any) -> Outcome[T]:
    """Run ``call`` and return what it returned or raised; the user's and the clock's get through."""
    try:
        return Outcome(value=call(*args, **kwargs))
    except (KeyboardInterrupt, DeadlinePassed):
        raise
    except BaseException as error:  # noqa: BLE001 - a plugin may raise anything; it becomes a status
        return Outcome(error=error)


@contextmanager
def foreign(owner: str, doing: str, mend: str) -> Iterator[None]:
    """Run a plugin's code outside of trials.

    What it changes of torch's flags and of random states, which decide what the user's own code computes,
    is put back, with a warning. Of what Ctrl-C ends it is said whose code it was: what hangs cannot say so.
    """
    with _results_kept(owner, doing, mend):
        try:
            yield
        except KeyboardInterrupt:
            _log.warning("Interrupted while %s %s. If it hangs: %s", owner, doing, mend)
            raise


@contextmanager
def _results_kept(owner: str, doing: str, mend: str) -> Iterator[None]:
    if "torch" not in sys.modules:  # the first to import it is asked nothing: what was before is not known
        yield
        return
    from kpt.globalstate import results_kept

    with results_kept() as changed:
        yield
    if changed:
        _log.warning(
            "%s changed %s while it %s; that was put back. To do without it: %s",
            *(owner, ", ".join(changed), doing, mend),
        )


def load(reference: str) -> Any:
    """The attribute that ``reference`` (``"module:attr"``) names.

    Raises `PluginError`, naming the reference and a command, for whatever the import raises.
    """
    if not isinstance(reference, str) or not REFERENCE.fullmatch(reference):
        raise PluginError(
            f"{reference!r} is not a reference; write 'package.module:attribute', "
            "for instance 'kpt_plugin_cpu.probe:CpuProbe'."
        )
    module_name, _, path = reference.partition(":")
    outcome = attempt(import_module, module_name)
    if outcome.error is not None:
        raise PluginError(
            f"{reference!r} cannot be loaded: {one_line(outcome.error)}.", _reinstall(module_name)
        ) from outcome.error
    value: Any = outcome.value
    for name in path.split("."):
        found = attempt(getattr, value, name)
        if found.error is not None:
            raise PluginError(
                f"{reference!r} cannot be loaded: {one_line(found.error)}.", _reinstall(module_name)
            ) from found.error
        value = found.value
    return value


def instantiate(reference: str) -> Any:
    """What ``reference`` names; an instance of it, made without arguments, if it is a class."""
    value = load(reference)
    if not isinstance(value, type):
        return value
    outcome = attempt(value)
    if outcome.error is not None:
        raise PluginError(
            f"{reference!r} cannot be created: {one_line(outcome.error)}.",
            _reinstall(reference.partition(":")[0]),
        ) from outcome.error
    return outcome.value


def _reinstall(module_name: str) -> str:
    """The command that reinstalls whatever distribution offers ``module_name``."""
    import importlib_metadata

    package = module_name.partition(".")[0]
    found = attempt(importlib_metadata.packages_distributions).value or {}
    owners = found.get(package)
    return install_command(owners[0], "--force-reinstall") if owners else f"python -c 'import {module_name}'"
