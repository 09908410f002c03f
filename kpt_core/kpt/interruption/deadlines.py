"""Blocks that are left once their deadline has passed, and the watch that interrupts them."""

from __future__ import annotations

import _thread
import ctypes
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from kpt.interruption.compilers import compilers, stop_workers

#: Seconds past the deadline for which the import of a module is let come to its end. That of a compiler
#: takes 2 to 6 s where nothing is cached; a module that hangs must not hang the run.
_IMPORT_PATIENCE = 10.0


#: Wakes the main thread. Programs that do not handle it ignore it, so that one too many does no harm.
_WAKE: signal.Signals | None = getattr(signal, "SIGURG", None)

#: Seconds that a new thread is waited for.
_START_PATIENCE = 1.0


class DeadlinePassed(BaseException):
    """A block ran past its deadline. Not an `Exception`, so that foreign handlers let it through."""


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


def _being_started(frame: FrameType | None) -> threading.Thread | None:
    """The thread that the calls which led to ``frame`` start, and wait for until it says that it runs."""
    for _ in range(4):  # of the event that it waits for, and of the event's condition
        if frame is None:
            return None
        if frame.f_code is threading.Thread.start.__code__:
            started = frame.f_locals.get("self")
            return started if isinstance(started, threading.Thread) else None
        frame = frame.f_back
    return None


def _imports(frame: FrameType | None) -> int:
    """How many imports are under way in the calls that led to ``frame``."""
    number = 0
    while frame is not None:
        code = frame.f_code
        number += code.co_name == "_find_and_load" and code.co_filename == "<frozen importlib._bootstrap>"
        frame = frame.f_back
    return number


def _compilers() -> dict[int, int]:
    """Inductor's compilers; none where they can't be looked for, without which the exception has to come."""
    try:
        return compilers()
    except Exception:  # noqa: BLE001 - no file descriptor is left, say
        return {}


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
        patient_until = time.monotonic() + _START_PATIENCE
        while True:
            with self._lock:
                if self._ended:
                    return
                waits = self._importing() and time.monotonic() < self.deadline + _IMPORT_PATIENCE
                waits = waits or self._another_starts()
                if not waits:
                    self.fired = True
                    _hush_finalisers()
                    running = _compilers()  # whose drivers the exception may make their caller kill
                    waits = self._starts_another(
                        patient_until
                    )  # nothing comes between this and the exception
                if not waits:
                    raise_in_thread(self.thread_id, DeadlinePassed)
                    _wake(self.thread_id)
                    # Inside the lock: the block's successor may compile as soon as `leave` returns.
                    with suppress(Exception):  # whatever fails there, this goes on
                        stop_workers(known=running)
            if self._inside.acquire(timeout=0.005 if waits else self.interval):
                return
            if not waits:
                patient_until = time.monotonic() + _START_PATIENCE

    def _importing(self) -> bool:
        """Whether the thread imports a module that it began to import inside the block."""
        return _imports(sys._current_frames().get(self.thread_id)) > self._imports

    def _starts_another(self, patient_until: float) -> bool:
        """Whether the thread waits for one that it started, and that an exception for it might end instead.

        It waits for ever for one that was ended so. Only a main thread can be woken: others are told that the
        thread runs, once it is clear that it never will.
        """
        if time.monotonic() < patient_until:
            return _being_started(sys._current_frames().get(self.thread_id)) is not None
        thread = _being_started(sys._current_frames().get(self.thread_id))
        if thread is not None:
            thread._started.set()  # type: ignore[attr-defined]
        return False

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
