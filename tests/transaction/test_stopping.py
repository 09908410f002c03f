"""How trials and plans end: undos that take long, threads left behind, and what watches a deadline."""

from __future__ import annotations

import signal
import sys
import threading
import time

import pytest

from kpt import interruption


def test_ctrl_c_right_after_the_main_thread_began_to_listen_leaves_no_handler(monkeypatch):
    set_handler = signal.signal

    def interrupted(number, handler):
        before = set_handler(number, handler)
        if handler is interruption._woken:
            raise KeyboardInterrupt
        return before

    monkeypatch.setattr(signal, "signal", interrupted)
    with pytest.raises(KeyboardInterrupt), interruption.deadline(5.0):
        pass
    assert signal.getsignal(signal.SIGURG) is signal.SIG_DFL


def test_a_watch_that_is_late_leaves_no_hook_behind(monkeypatch):
    """A watch takes the hook while its block is left: whoever comes second sees what the first one did."""
    before, entered, go_on = sys.unraisablehook, threading.Event(), threading.Event()

    class Slow(interruption._Hush):
        def __init__(self, hook):
            entered.set()
            go_on.wait(10.0)
            super().__init__(hook)

    monkeypatch.setattr(interruption, "_Hush", Slow)
    watch = interruption._Watch(time.monotonic() + 60.0, 0.5)
    watch.fired = True
    interruption._watches.add(watch)
    thread = threading.Thread(target=interruption._hush_finalisers)
    thread.start()
    entered.wait(10.0)
    interruption._watches.discard(watch)
    threading.Timer(0.2, go_on.set).start()
    interruption._hush_finalisers()
    go_on.set()
    thread.join()
    assert sys.unraisablehook is before
