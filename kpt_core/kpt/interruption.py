"""How running work is stopped when its deadline passes.

A trial is Python code that calls native code and starts compilers. Four things stop it:

* an exception raised asynchronously in its thread, delivered between two bytecodes;
* a signal, where the thread is the main one: it ends a wait in the operating system (a sleep, a lock, a pipe,
  a child process), during which there are no bytecodes;
* the end of its compilers: their processes are killed, so that whoever waits for them fails;
* repetition of all of it until the block is left, because foreign code may swallow the exception.

What can't be interrupted is a single native call (one matrix product, one weight packing, loading a
shared library), and a wait in another thread than the main one: the exception arrives when it returns. The
import of a module is not interrupted either, for as long as `_IMPORT_PATIENCE`: what is imported half is
left registered elsewhere, and the library can't be imported again in this process.
"""

from __future__ import annotations

import _thread
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
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


#: Seconds past the deadline for which the import of a module is let come to its end. That of a compiler
#: takes 2 to 6 s where nothing is cached; a module that hangs must not hang the run.
_IMPORT_PATIENCE = 10.0


#: Wakes the main thread. Programs that do not handle it ignore it, so that one too many does no harm.
_WAKE: signal.Signals | None = getattr(signal, "SIGURG", None)


#: Seconds that a compiler driver gets to end by itself: removing its temporary files takes milliseconds.
_DRIVER_PATIENCE = 2.0

#: Seconds that a new thread is waited for.
_START_PATIENCE = 1.0


class DeadlinePassed(BaseException):
    """A block ran past its deadline. Not an `Exception`, so that foreign handlers let it through."""


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
    children: dict[int, list[int]] = {}
    names: dict[int, str] = {}
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except OSError:  # it ended meanwhile
            continue
        pid = int(entry.name)
        # The name is in parentheses and may itself hold some; the fields after it are fixed.
        head, _, tail = stat.rpartition(")")
        children.setdefault(int(tail.split()[1]), []).append(pid)
        names[pid] = head.partition("(")[2]
    found: list[Process] = []
    pending = [root if root is not None else os.getpid()]
    while pending:
        parent = pending.pop()
        for pid in children.get(parent, ()):
            pending.append(pid)
            found.append(Process(pid, parent, names[pid]))
    return found


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


def _compilers() -> dict[int, int]:
    """Inductor's compilers below this process, and their parents."""
    below = {process.pid: process for process in descendants()}
    mine: set[int] = set()
    for process in below.values():  # parents come before their children
        if process.parent in mine or (_is_compiler(process.name) and _of_inductor(process.pid)):
            mine.add(process.pid)
    return {pid: below[pid].parent for pid in mine if _is_compiler(below[pid].name)}


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


def _end_compilers(patience: float) -> int:
    """End inductor's compilers and remove what they were writing; return how many processes were signalled.

    Compilers write under the final name, and whoever waits for their lock looks only whether the file is
    there. So it is removed before they are ended, and again once none is left that could write it.
    """
    ended = 0
    outputs: set[Path] = set()
    drivers: set[int] = set()
    waited_until = time.monotonic() + patience
    while running := _compilers():
        late = time.monotonic() >= waited_until
        if late:  # one that is stopped starts nothing more: what runs then is all that there is to end
            for pid in running:
                _signal(pid, signal.SIGSTOP)
            running = _compilers()
        outputs.update(path for pid in running if (path := _output_of(pid)) is not None)
        _remove(outputs)
        ended += sum(_signal(pid, signal.SIGKILL) for pid, parent in running.items() if parent in running)
        if late:
            drivers = {pid for pid, parent in running.items() if parent not in running}
            for pid in drivers:  # they remove their temporary files
                ended += _signal(pid, signal.SIGTERM)
                _signal(pid, signal.SIGCONT)
            break
        time.sleep(0.02)
    waited_until = time.monotonic() + _DRIVER_PATIENCE
    while drivers & _compilers().keys():
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


def stop_workers(patience: float = 0.5) -> int:
    """End inductor's compilers below this process; return how many processes were ended.

    Compilers started by inductor's threads and by its worker pool are ended and what is queued
    behind them is cancelled. Pools and failures are forgotten, so that the next compilation starts
    anew. Only inductor's own worker processes and compilers that work in its cache folder are touched,
    never a build of the user's.

    What a compiler driver runs is killed and the driver left to end by itself; after ``patience``
    seconds it is ended too. Their half-written outputs are removed: the next compilation, of any process that
    shares the cache, would take them for finished ones.
    """
    module = sys.modules.get("torch._inductor.async_compile")
    workers: set[int] = set()
    pools: list[subprocess.Popen[bytes]] = []
    if module is not None:
        compiler = module.AsyncCompile
        if compiler.pool.cache_info().currsize:
            compiler.pool().shutdown(wait=False, cancel_futures=True)
            compiler.pool.cache_clear()
        for pool in list(getattr(module, "_pool_set", ())):
            process = getattr(pool, "process", None)
            if process is not None:
                workers.add(process.pid)
                pools.append(process)
            workers.update(getattr(pool, "_processes", None) or ())
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
    ended += _end_compilers(patience)
    _forget_failed_libraries()
    return ended


def raise_in_thread(thread_id: int, exception: type[BaseException]) -> bool:
    """Raise ``exception`` in a thread at its next bytecode; False if there is no such thread."""
    argument = ctypes.py_object(exception)
    return ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id), argument) == 1


def _woken(number: int, frame: FrameType | None) -> None:
    """Does nothing: running any Python code at all delivers the exception that is pending."""


def _may_listen() -> bool:
    """Whether the main thread can be woken by a signal; no, where somebody else decides what that does."""
    return (
        _WAKE is not None
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(_WAKE) is signal.SIG_DFL
    )


def _wake(thread_id: int) -> None:
    """End the wait of a thread, if it is the main thread and listens."""
    if _WAKE is not None and thread_id == threading.main_thread().ident and signal.getsignal(_WAKE) is _woken:
        signal.pthread_kill(thread_id, _WAKE)


def _imports(frame: FrameType | None) -> int:
    """How many imports are under way in the calls that led to ``frame``."""
    number = 0
    while frame is not None:
        code = frame.f_code
        number += code.co_name == "_find_and_load" and code.co_filename == "<frozen importlib._bootstrap>"
        frame = frame.f_back
    return number


class _Watch:
    """Interrupts one thread from ``deadline`` on, until it is told that the block was left."""

    def __init__(self, deadline: float, interval: float) -> None:
        self.thread_id = threading.get_ident()
        self.deadline = deadline
        self.interval = interval
        self.fired = False
        self._ended = False
        self._listens = False
        self._runs = False
        self._starts_until = 0.0
        # A program may call kpt while it is itself being imported.
        self._imports = _imports(sys._getframe())
        # Held until the block is left. A plain lock: unlike an Event, it cannot be torn by a Ctrl-C.
        self._inside = threading.Lock()
        self._inside.acquire()
        self._lock = threading.Lock()

    def start(self) -> None:
        # Until it has run, CPython 3.11 knows a new thread by its creator's id: an exception for this thread
        # would end the new one, which then watches nothing.
        self._starts_until = time.monotonic() + _START_PATIENCE
        _watches.add(self)
        self._listens = _may_listen()  # said before it is done: a Ctrl-C may arrive in between
        if self._listens:
            assert _WAKE is not None
            signal.signal(_WAKE, _woken)
        # `Thread.start` waits for the new thread in Python code, which a Ctrl-C can tear.
        _thread.start_new_thread(self._run, ())
        while not self._runs and time.monotonic() < self._starts_until:
            time.sleep(0)

    def _run(self) -> None:
        self._runs = True
        if self._inside.acquire(timeout=max(0.0, self.deadline - time.monotonic())):
            return
        while True:
            with self._lock:
                if self._ended:
                    return
                waits = self._importing() and time.monotonic() < self.deadline + _IMPORT_PATIENCE
                waits = waits or self._another_starts()
                if not waits:
                    self.fired = True
                    _hush_finalisers()
                    raise_in_thread(self.thread_id, DeadlinePassed)
                    _wake(self.thread_id)
                    # Inside the lock: the block's successor may compile as soon as `leave` returns.
                    stop_workers()
            if self._inside.acquire(timeout=0.005 if waits else self.interval):
                return

    def _importing(self) -> bool:
        """Whether the thread imports a module that it began to import inside the block."""
        return _imports(sys._current_frames().get(self.thread_id)) > self._imports

    def _another_starts(self) -> bool:
        """Whether a watch over the same thread has a thread of its own that did not run yet."""
        now = time.monotonic()
        mine = [watch for watch in tuple(_watches) if watch.thread_id == self.thread_id]
        return any(not watch._runs and now < watch._starts_until for watch in mine)

    def leave(self) -> None:
        """No exception is raised once this returns; it may itself be interrupted."""
        with self._lock:
            fired = self.fired
            if not self._ended:
                self._ended = True
                self._inside.release()
        _watches.discard(self)
        if self._listens:
            assert _WAKE is not None
            if signal.getsignal(_WAKE) is _woken:
                signal.signal(_WAKE, signal.SIG_DFL)
            self._listens = False
        if not fired:
            return
        try:
            self._deliver()
        finally:
            _hush_finalisers()

    def _deliver(self) -> None:
        # One may be pending. Taking it back (setting NULL) leaves CPython's "exception pending" flag
        # set, and with it a profiled frame of Python 3.11 never gets past its first instruction. So it
        # is delivered here instead.
        try:
            # Again and again: until a new thread has run, CPython 3.11 knows it by its creator's id, and the
            # exception may have gone there.
            while True:
                raise_in_thread(self.thread_id, DeadlinePassed)
                time.sleep(0)
        except DeadlinePassed:
            return


class _Hush:
    """A `sys.unraisablehook` that says nothing of deadlines.

    What is raised in a finaliser or the callback of a weak reference reaches nobody, and Python prints it.
    A deadline that passes there is raised again until it is heard.
    """

    def __init__(self, before: Callable[[sys.UnraisableHookArgs], Any]) -> None:
        self.before = before

    def __call__(self, unraisable: sys.UnraisableHookArgs, /) -> None:
        if not issubclass(unraisable.exc_type, DeadlinePassed):
            self.before(unraisable)


def _hush_finalisers() -> None:
    """Set the hook while a watch interrupts its thread, and take it back afterwards if it is still there."""
    with _hush_lock:  # two watches at once would take each other's hook for the user's
        hook = sys.unraisablehook
        wanted = any(watch.fired for watch in tuple(_watches))
        if wanted and not isinstance(hook, _Hush):
            sys.unraisablehook = _Hush(hook)
        elif not wanted and isinstance(hook, _Hush):
            sys.unraisablehook = hook.before


#: One that a thread may take twice: a finaliser may run another plan's undo, under a deadline of its own.
_hush_lock = threading.RLock()


#: Watches that were started and not yet told that their block was left.
_watches: set[_Watch] = set()


@contextmanager
def contained() -> Iterator[None]:
    """No deadline set inside the block, in this thread, outlives it.

    A Ctrl-C may arrive between two bytecodes of ``with`` itself, so that a block is never left in order;
    its watch would then interrupt whatever this thread does later.
    """
    before = set(_watches)
    try:
        yield
    finally:
        for watch in _watches - before:
            if watch.thread_id == threading.get_ident():
                watch.leave()


@contextmanager
def deadline(seconds: float | None, *, interval: float = 0.5) -> Iterator[None]:
    """Leave the block with `DeadlinePassed` once ``seconds`` have passed; ``None`` never does.

    The exception is repeated every ``interval`` seconds until the block is left, and compilers
    below this process are killed meanwhile.
    """
    if seconds is None:
        yield
        return
    watch = _Watch(time.monotonic() + seconds, interval)
    failure: BaseException | None = None
    interrupted: KeyboardInterrupt | None = None
    try:
        watch.start()  # inside the block that ends it: a Ctrl-C may arrive as soon as the thread runs
        yield
    except BaseException as error:
        failure = error
        if isinstance(error, KeyboardInterrupt) or not watch.fired:
            raise
    finally:
        # An exception that is already on its way, or a Ctrl-C, may arrive here; only then is the loop
        # repeated. A watch that was not told would go on raising in this thread for ever.
        while True:
            try:
                watch.leave()
                break
            except DeadlinePassed:
                continue
            except KeyboardInterrupt as error:
                interrupted = error
    if interrupted is not None:
        raise interrupted
    if watch.fired:
        # A compiler that was killed makes its caller raise something of its own: one name for both.
        raise DeadlinePassed(f"stopped after {seconds:.1f} s") from (
            failure if isinstance(failure, Exception) else None
        )
