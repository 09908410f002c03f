"""The compilers that inductor started below this process, and how they are ended."""

from __future__ import annotations

import _thread
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

#: Names of the programs that a compiler driver runs.
_COMPILERS = (
    "g++",
    "gcc",
    "c++",
    "cc1plus",
    "cc1",
    "as",
    "ld",
    "collect2",
    "lto1",
    "lto-wrapper",
    "icpx",
    "ptxas",
)
_COMPILER_PREFIXES = ("clang", "ld.", "g++-", "gcc-", "x86_64-", "aarch64-", "ptxas")

#: Seconds that a pool of threads is waited for to hear that it is shut down.
_POOL_PATIENCE = 0.2

#: Seconds that a compiler driver gets to end by itself: removing its temporary files takes milliseconds.
_DRIVER_PATIENCE = 2.0


class Process(NamedTuple):
    pid: int
    parent: int
    name: str


def descendants(root: int | None = None) -> list[Process]:
    """Processes below ``root`` (default: this process).

    Empty where there is no ``/proc`` (macOS, Windows): children are then not found.
    """
    proc = Path("/proc")
    if not proc.is_dir() or not sys.platform.startswith("linux"):
        return []
    children: dict[int, list[Process]] = {}
    for entry in os.listdir(proc):
        process = _process(int(entry)) if entry.isdigit() else None
        if process is not None:
            children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    pending = [root if root is not None else os.getpid()]
    while pending:
        for process in children.get(pending.pop(), ()):
            pending.append(process.pid)
            found.append(process)
    return found


def _process(pid: int) -> Process | None:
    """What ``/proc`` says of a process; None if it ended meanwhile."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")  # a name may be any bytes
    except OSError:
        return None
    # The name is in parentheses and may itself hold some; the fields after it are fixed.
    head, _, tail = stat.rpartition(")")
    return Process(pid, int(tail.split()[1]), head.partition("(")[2])


def _is_compiler(name: str) -> bool:
    return name in _COMPILERS or name.startswith(_COMPILER_PREFIXES)


def _signal(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _of_inductor(pid: int) -> bool:
    """Whether a compiler works on inductor's files: it names, or runs in, inductor's cache folder.

    What the compiler driver runs (cc1plus, as, ld) reads and writes some temporary files only, but has
    the driver's working folder, which inductor makes below its cache.
    """
    try:
        facts = Path(f"/proc/{pid}/cmdline").read_bytes(), os.fsencode(os.readlink(f"/proc/{pid}/cwd"))
    except OSError:  # it ended, or is not ours to look at
        return False
    marks = [b"torchinductor"]
    if folder := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):  # inductor itself sets it when it first looks
        marks.append(os.fsencode(os.path.abspath(folder)) + b"/")
    return any(mark in fact + b"/" for mark in marks for fact in facts)


def compilers(seen: Collection[int] = ()) -> dict[int, int]:
    """Inductor's compilers below this process, and their parents.

    And those of the ones that were ``seen`` there which still run: what a compiler driver started is nobody's
    child once the driver was killed by whoever waited for it.
    """
    below = {process.pid: process for process in descendants()}
    mine: set[int] = set()
    for process in below.values():  # parents come before their children
        if process.parent in mine or (_is_compiler(process.name) and _of_inductor(process.pid)):
            mine.add(process.pid)
    found = {pid: below[pid].parent for pid in mine if _is_compiler(below[pid].name)}
    for pid in {*seen} - below.keys():
        orphan = _process(pid)
        if orphan is not None and _is_compiler(orphan.name) and _of_inductor(pid):
            found[pid] = orphan.parent
    return found


def _output_of(pid: int) -> Path | None:
    """The file that a compiler writes (its argument after ``-o``)."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        folder = os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return None
    if b"-o" not in arguments[:-1]:
        return None
    return Path(folder) / os.fsdecode(arguments[arguments.index(b"-o") + 1])


def _forget_failed_libraries() -> None:
    """Drop inductor's entries for libraries that were never loaded: they keep the failure for good."""
    codecache = sys.modules.get("torch._inductor.codecache")
    if codecache is None:
        return
    pending = [codecache.CppCodeCache]
    while pending:
        owner = pending.pop()
        pending.extend(owner.__subclasses__())
        for key, load in list(owner.cache.items()):
            code, cells = getattr(load, "__code__", None), getattr(load, "__closure__", None) or ()
            held = dict(zip(code.co_freevars, cells)) if code is not None else {}
            if "lib" in held and held["lib"].cell_contents is None:
                owner.cache.pop(key, None)


def _end_compilers(patience: float, known: Mapping[int, int]) -> int:
    """End inductor's compilers and remove what they were writing; return how many processes were signalled.

    Those ``known`` to be some, by their parents, are ended too where they have no parent any more.

    Compilers write under the final name, and whoever waits for their lock looks only whether the file is
    there. So it is removed before they are ended, and again once none is left that could write it.
    """
    ended = 0
    outputs: set[Path] = set()
    drivers: set[int] = set()
    seen = {*known}
    run_by_drivers = {pid for pid, parent in known.items() if parent in known}
    waited_until = time.monotonic() + patience
    while running := compilers(seen):
        late = time.monotonic() >= waited_until
        if late:  # one that is stopped starts nothing more: what runs then is all that there is to end
            for pid in running:
                _signal(pid, signal.SIGSTOP)
            running = compilers(seen)
        seen |= running.keys()
        outputs.update(path for pid in running if (path := _output_of(pid)) is not None)
        _remove(outputs)
        for pid, parent in running.items():
            if parent in running or pid in run_by_drivers:
                ended += _signal(pid, signal.SIGKILL)
        if late:
            drivers = {pid for pid, parent in running.items() if parent not in running} - run_by_drivers
            for pid in drivers:  # they remove their temporary files
                ended += _signal(pid, signal.SIGTERM)
                _signal(pid, signal.SIGCONT)
            break
        time.sleep(0.02)
    waited_until = time.monotonic() + _DRIVER_PATIENCE
    while drivers & compilers(seen).keys():
        if time.monotonic() >= waited_until:
            for pid in drivers:
                _signal(pid, signal.SIGKILL)
            break
        time.sleep(0.02)
    _remove(outputs)
    return ended


def _remove(paths: set[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _shut_down(pool: Any) -> None:
    """Cancel what is queued in a pool of threads, without waiting for long.

    A pool is locked while it starts a thread. Where an exception meant for its caller ended that thread, the
    caller waits with the lock, and only hears the next exception if nobody waits for the lock here.
    """
    done = threading.Lock()
    done.acquire()

    def shut_down() -> None:
        try:
            pool.shutdown(wait=False, cancel_futures=True)
        finally:
            done.release()

    _thread.start_new_thread(shut_down, ())
    done.acquire(timeout=_POOL_PATIENCE)


def stop_workers(patience: float = 0.5, known: Mapping[int, int] = MappingProxyType({})) -> int:
    """End inductor's compilers below this process; return how many processes were ended.

    Compilers started by inductor's threads and by its worker pool are ended and what is queued
    behind them is cancelled. Pools and failures are forgotten, so that the next compilation starts
    anew. Only inductor's own worker processes and compilers that work in its cache folder are touched,
    never a build of the user's.

    What a compiler driver runs is killed and the driver left to end by itself; after ``patience``
    seconds it is ended too. So are the ``known`` ones, which were `compilers` before: an interrupted caller
    kills its driver, and nobody else looks for what that had started. What it starts in between is not found.
    Their half-written outputs are removed: the next compilation, of any process that shares the cache, would
    take them for finished ones.
    """
    module = sys.modules.get("torch._inductor.async_compile")
    workers: set[int] = set()
    pools: list[subprocess.Popen[bytes]] = []
    if module is not None:
        compiler = module.AsyncCompile
        if compiler.pool.cache_info().currsize:
            pool = compiler.pool()
            compiler.pool.cache_clear()
            _shut_down(pool)
        for processes in list(getattr(module, "_pool_set", ())):
            process = getattr(processes, "process", None)
            if process is not None:
                workers.add(process.pid)
                pools.append(process)
            workers.update(getattr(processes, "_processes", None) or ())
    ended = 0
    if module is not None and workers:
        # Asked to shut down, a pool would finish its work first.
        for worker in workers:
            ended += sum(_signal(pid, signal.SIGKILL) for pid, _, _ in descendants(worker))
            ended += _signal(worker, signal.SIGKILL)
        module.after_fork()
        for process in pools:  # nobody else asks for them any more: each would stay as a zombie
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=2.0)
    ended += _end_compilers(patience, known)
    _forget_failed_libraries()
    return ended
