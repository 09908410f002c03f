"""Threads that a plan starts and leaves behind: Python has no way to end them, so the receipt names them."""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from typing import Any

#: Whose threads belong to the process and not to a plan: compilers keep theirs for the next compilation, and
#: a library of progress bars its one monitor for the next bar.
_LIBRARIES = frozenset({"torch", "triton", "kpt", "tqdm"})
#: Seconds that a thread which was told to end is waited for.
_PATIENCE = 0.05

_numbers = itertools.count()
_newest = -1
_named: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


class StartedThreads:
    """Notes threads that were started since construction, as long as no other plan is applied."""

    def __init__(self) -> None:
        global _newest
        self._number = _newest = next(_numbers)
        self._before = weakref.WeakSet(threading.enumerate())
        self._started: weakref.WeakSet[threading.Thread] = weakref.WeakSet()

    def look(self) -> None:
        """Note what was started by now."""
        if self._number == _newest:
            started = (t for t in threading.enumerate() if t not in self._before and not _of_a_library(t))
            self._started.update(started)

    def left(self) -> list[str]:
        """Names of those that still run. Each thread is named once, whoever asks."""
        found = [thread for thread in self._started if thread not in _named and _runs(thread)]
        _named.update(found)
        return sorted(map(_described, found))


def _runs(thread: threading.Thread) -> bool:
    if thread is not threading.current_thread():
        thread.join(_PATIENCE)
    return thread.is_alive()


def _described(thread: threading.Thread) -> str:
    target = getattr(thread, "_target", None)
    name = getattr(
        target, "__qualname__", type(thread).__qualname__ if target is None else type(target).__name__
    )
    return f"{thread.name} ({name})"


def _of_a_library(thread: threading.Thread) -> bool:
    if isinstance(thread, threading._DummyThread):  # not started by Python code: autograd's, for instance
        return True
    target: Any = getattr(thread, "_target", None)
    modules = (getattr(target, "__module__", None), type(thread).__module__)
    if any((module or "").partition(".")[0] in _LIBRARIES for module in modules):
        return True
    return _executor_of(thread) is not None and _executor_of(thread) is _pool_of_inductor()


def _executor_of(thread: threading.Thread) -> Any:
    """The `concurrent.futures` executor whose worker ``thread`` is."""
    reference = next(iter(getattr(thread, "_args", ())), None)
    return reference() if isinstance(reference, weakref.ref) else None


def _pool_of_inductor() -> Any:
    module = sys.modules.get("torch._inductor.async_compile")
    compiler = getattr(module, "AsyncCompile", None)
    return compiler.pool() if compiler is not None and compiler.pool.cache_info().currsize else None
