"""Plugins are loaded in a process of its own first: one that hangs, or ends its process, is named there.

What hangs in native code can be ended with its process only, and a library that is half imported is of no use
to the process that it is left in. So what tells about an installation lets another process go ahead.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import IO, TYPE_CHECKING

from kpt.plugins.status import disable_command

if TYPE_CHECKING:
    from kpt.plugins import PluginStatus, Registry

#: Seconds that a plugin may take to be loaded, and as many to look for its device. First imports from a slow
#: disk take some; what takes longer holds up every program that uses kpt.
PATIENCE = 30.0

_PROGRAM = "import sys; sys.path[:] = sys.argv[1].split('\\n'); from kpt.cli.rehearsal import main; main()"
#: What is said to be done while it lasts, and what is wrong if it never ends.
_LOADING, _DETECTING, _DONE = "loading", "detecting", "done"
_DOING = {_LOADING: "its import or a hook", _DETECTING: "kpt_hardware: its probe"}


@dataclass(frozen=True)
class Loaded:
    """The plugins that answer, and what is said about each that is installed."""

    registry: Registry
    statuses: tuple[PluginStatus, ...]


def loaded() -> Loaded:
    """Load the plugins that can be loaded; the statuses say which can not, and how to do without."""
    from kpt import profiles
    from kpt.plugins import registry

    refused, names = _installed()
    failures = dict(_failures(names, tuple(sys.path), PATIENCE))
    if not failures:
        found = registry()
        return Loaded(found, profiles.statuses(found))
    found = registry([name for name in names if name not in failures], strict=False)
    return Loaded(found, tuple(_told(status, failures, refused) for status in profiles.statuses(found)))


def _told(
    status: PluginStatus, failures: dict[str, str], refused: dict[tuple[str, str], PluginStatus]
) -> PluginStatus:
    """``status``, or what is wrong with a plugin that was left out of the selection for it."""
    own = refused.get((status.name, status.distribution))
    if own is not None:
        return own
    if not status.distribution or status.name not in failures:
        return status
    return replace(
        status, state="broken", reason=failures[status.name], mend=disable_command(status.name), hooks=()
    )


def _installed() -> tuple[dict[tuple[str, str], PluginStatus], tuple[str, ...]]:
    """Statuses of plugins that may not be imported, by name and distribution, and the names of the others.

    Only metadata is read for it.
    """
    from kpt.plugins.discovery import candidates, refusal

    refused: dict[tuple[str, str], PluginStatus] = {}
    names: list[str] = []
    for found in candidates()[0]:
        status = refusal(found, None)
        if status is None:
            names.append(found.name)
        else:
            refused[found.name, found.distribution] = status
    return refused, tuple(dict.fromkeys(names))


@lru_cache(maxsize=1)
def _failures(names: tuple[str, ...], path: tuple[str, ...], patience: float) -> tuple[tuple[str, str], ...]:
    """The plugins that do not come to an end, or end their process, with what is wrong."""
    found: list[tuple[str, str]] = []
    rest = list(names)
    while rest:
        failure = _rehearse(rest, path, patience)
        if failure is None:
            break
        position, reason = failure
        found.append((rest[position], reason))
        del rest[: position + 1]
    return tuple(found)


def _rehearse(names: Sequence[str], path: Sequence[str], patience: float) -> tuple[int, str] | None:
    """The position of the first plugin that fails in another process, and how; None if all get through."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, "\n".join(path), *names],
            stdin=subprocess.PIPE,  # that nobody writes to: a plugin that asks a question waits for ever
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # so that what a plugin started ends with it
        )
        assert process.stdin is not None and process.stdout is not None
        lines: queue.Queue[str] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
        reader.start()
        position, doing = -1, ""
        try:
            while line := lines.get(timeout=patience if doing else 2 * patience):
                doing, _, number = line.strip().partition(" ")
                if doing == _DONE:
                    return None
                position = int(number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=patience)
        except queue.Empty:
            if position >= 0:
                return position, f"{_DOING[doing]} did not come to an end within {patience:g} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.stdin.close()
            with suppress(subprocess.TimeoutExpired):  # one that waits for a device outlives even that
                process.wait(timeout=1.0)
            reader.join(timeout=1.0)
        if position >= 0:
            return position, f"{_DOING[doing]} ended the process, with status {process.returncode}"
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines()
        raise RuntimeError(
            f"{sys.executable} cannot load plugins in a process of their own: "
            f"{said[-1] if said else f'status {process.returncode}'}"
        )


def _read(stream: IO[str], lines: queue.Queue[str]) -> None:
    """Hand over the lines, and an empty one when there are no more."""
    with stream:
        for line in stream:
            lines.put(line)
    lines.put("")


def main() -> None:
    """Load the plugins that the program's arguments name, one after the other, and say so."""
    with os.fdopen(os.dup(1), "w") as parent:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a plugin may print

        def say(*words: object) -> None:
            print(*words, file=parent, flush=True)

        from kpt import profiles
        from kpt.plugins import registry

        for position, name in enumerate(sys.argv[2:]):
            say(_LOADING, position)
            found = registry([name], strict=False)
            say(_DETECTING, position)
            profiles.detect(found)
        say(_DONE)
        os._exit(0)  # threads that plugins started may never end
