"""A block is left once its deadline has passed, whatever it waits for, and nothing of that outlives it."""

from __future__ import annotations

import _thread
import random
import signal
import sys
import threading
import time

import pytest

from kpt import interruption
from kpt.interruption import deadlines


def test_deadline_stops_python_code_and_is_quiet_otherwise():
    with interruption.deadline(30.0):
        pass
    with pytest.raises(interruption.DeadlinePassed), interruption.deadline(0.1, interval=0.05):
        while True:
            try:
                time.sleep(0.01)
            except Exception:  # noqa: BLE001 - a foreign handler must not catch the deadline
                pytest.fail("caught")
    time.sleep(0.15)  # nothing arrives later


SLOW_IMPORT = """
import time
started = True
end = time.monotonic() + {seconds}
while time.monotonic() < end:
    time.sleep(0.01)
whole = True
"""


def test_the_import_of_a_module_comes_to_its_end_past_the_deadline(tmp_path, monkeypatch):
    """Half of a library is registered elsewhere and cannot be imported again: compilers would be lost."""
    (tmp_path / "kpt_test_slow_import.py").write_text(SLOW_IMPORT.format(seconds=1.0))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kpt_test_slow_import", raising=False)
    with pytest.raises(interruption.DeadlinePassed), interruption.deadline(0.2):
        import kpt_test_slow_import

        while True:
            time.sleep(0.001)
    assert kpt_test_slow_import.whole and sys.modules["kpt_test_slow_import"] is kpt_test_slow_import


def test_a_module_that_hangs_is_interrupted_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "kpt_test_hanging_import.py").write_text(SLOW_IMPORT.format(seconds=1000.0))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(deadlines, "_IMPORT_PATIENCE", 0.3)
    with pytest.raises(interruption.DeadlinePassed), interruption.deadline(0.2):
        import kpt_test_hanging_import  # noqa: F401
    assert "kpt_test_hanging_import" not in sys.modules


def test_a_deadline_holds_in_a_program_that_is_itself_being_imported(tmp_path, monkeypatch):
    (tmp_path / "kpt_test_importing.py").write_text(
        "import time\nfrom kpt.interruption import DeadlinePassed, deadline\n"
        "try:\n    with deadline(0.2):\n        while True:\n            time.sleep(0.001)\n"
        "except DeadlinePassed:\n    stopped = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(deadlines, "_IMPORT_PATIENCE", 1000.0)
    import kpt_test_importing

    assert kpt_test_importing.stopped


class Freed:
    """Runs Python code while it is collected, until that is interrupted."""

    def __del__(self):
        while True:
            time.sleep(0.001)


class Failing:
    def __del__(self):
        raise ValueError


def test_a_deadline_that_passes_in_a_finaliser_says_nothing(monkeypatch):
    """Python prints what a finaliser raises; the exception comes again where it is heard."""
    printed: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: printed.append(unraisable.exc_type))
    before = sys.unraisablehook
    with pytest.raises(interruption.DeadlinePassed), interruption.deadline(0.1, interval=0.05):
        Freed()
        Failing()
        while True:
            time.sleep(0.001)
    assert printed == [ValueError] and sys.unraisablehook is before


def test_a_deadline_ends_no_thread_that_watches_another(monkeypatch):
    ended = []
    monkeypatch.setattr("sys.unraisablehook", lambda raised: ended.append(raised.exc_type))
    for step in range(200):
        with pytest.raises(interruption.DeadlinePassed), interruption.deadline(5e-4 * (step % 7)):
            for _ in range(200):
                with interruption.deadline(5.0):
                    pass
            time.sleep(30.0)
    time.sleep(0.05)
    assert ended == []


def test_a_deadline_waits_for_a_thread_that_is_slow_to_start(monkeypatch):
    """CPython 3.11 knows a new thread by its creator's id: the exception would end the new one."""
    real = threading._start_new_thread
    monkeypatch.setattr(
        threading,
        "_start_new_thread",
        lambda function, args: real(lambda: (time.sleep(0.3), function(*args)), ()),
    )
    started = False
    with pytest.raises(interruption.DeadlinePassed), interruption.deadline(0.05, interval=0.05):
        threading.Thread(target=int).start()
        started = True
        time.sleep(30.0)
    assert started


def test_a_thread_that_waits_for_one_that_never_starts_is_interrupted(monkeypatch):
    """One was ended before it ran. Nothing else wakes a thread that is not the main thread."""
    ended = []

    def waits() -> None:
        monkeypatch.setattr(threading, "_start_new_thread", lambda function, args: None)
        try:
            with interruption.deadline(0.05, interval=0.05):
                threading.Thread(target=int).start()
                time.sleep(0.01)
        except interruption.DeadlinePassed:
            ended.append(True)

    _thread.start_new_thread(waits, ())
    until = time.monotonic() + 10.0
    while not ended and time.monotonic() < until:
        time.sleep(0.01)
    assert ended


def test_a_signal_handler_of_the_users_is_left_alone():
    heard = []
    before = signal.signal(signal.SIGURG, lambda number, frame: heard.append(number))
    mine = signal.getsignal(signal.SIGURG)
    try:
        with pytest.raises(interruption.DeadlinePassed), interruption.deadline(0.05, interval=0.05):
            while True:
                time.sleep(0.001)
        assert signal.getsignal(signal.SIGURG) is mine and heard == []
    finally:
        signal.signal(signal.SIGURG, before)
    with pytest.raises(interruption.DeadlinePassed), interruption.deadline(0.05):
        time.sleep(1000.0)
    assert signal.getsignal(signal.SIGURG) is before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs interval timers")
def test_no_deadline_outlives_its_block_in_a_storm_of_signals():
    """A watch that was never told would raise in this thread later, far away from kpt."""
    generator, interrupted, stray = random.Random(0), 0, 0
    threads = _thread._count()

    def block(seconds: float) -> None:
        try:
            with interruption.contained(), interruption.deadline(seconds):
                for _ in range(generator.randrange(20_000)):
                    pass
        except interruption.DeadlinePassed:
            return
        for _ in range(5_000):
            pass

    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for step in range(500):
            try:
                signal.setitimer(signal.ITIMER_REAL, generator.uniform(1e-6, 6e-4))
                block(0.3 if step % 2 else 2e-4)
            except KeyboardInterrupt:
                interrupted += 1
            except interruption.DeadlinePassed:
                stray += 1
            while True:
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.0)
                    break
                except KeyboardInterrupt:
                    interrupted += 1
    finally:
        signal.signal(signal.SIGALRM, before)
    time.sleep(0.5)
    assert interrupted > 50 and stray == 0
    assert _thread._count() <= threads


def test_ctrl_c_right_after_the_main_thread_began_to_listen_leaves_no_handler(monkeypatch):
    set_handler = signal.signal

    def interrupted(number, handler):
        before = set_handler(number, handler)
        if handler is deadlines._woken:
            raise KeyboardInterrupt
        return before

    monkeypatch.setattr(signal, "signal", interrupted)
    with pytest.raises(KeyboardInterrupt), interruption.deadline(5.0):
        pass
    assert signal.getsignal(signal.SIGURG) is signal.SIG_DFL


def test_a_watch_that_is_late_leaves_no_hook_behind(monkeypatch):
    """A watch takes the hook while its block is left: whoever comes second sees what the first one did."""
    before, entered, go_on = sys.unraisablehook, threading.Event(), threading.Event()

    class Slow(deadlines._Hush):
        def __init__(self, hook):
            entered.set()
            go_on.wait(10.0)
            super().__init__(hook)

    monkeypatch.setattr(deadlines, "_Hush", Slow)
    watch = deadlines._Watch(time.monotonic() + 60.0, 0.5)
    watch.fired = True
    deadlines._watches.add(watch)
    thread = threading.Thread(target=deadlines._hush_finalisers)
    thread.start()
    entered.wait(10.0)
    deadlines._watches.discard(watch)
    threading.Timer(0.2, go_on.set).start()
    deadlines._hush_finalisers()
    go_on.set()
    thread.join()
    assert sys.unraisablehook is before


def test_a_deadline_comes_where_compilers_cannot_be_looked_for(monkeypatch):
    """Without a file descriptor that is left, say; what was raised there had ended the watch."""

    def failing(*args, **options):
        raise OSError("too many open files")

    monkeypatch.setattr(deadlines, "compilers", failing)
    monkeypatch.setattr(deadlines, "stop_workers", failing)
    began, heard = time.monotonic(), 0
    with pytest.raises(interruption.DeadlinePassed), interruption.deadline(0.05, interval=0.05):
        for _ in range(2):  # and once more, where it was swallowed
            try:
                time.sleep(20.0)
            except interruption.DeadlinePassed:
                heard += 1
    assert heard == 2 and time.monotonic() - began < 15.0
