"""Progress of a run, for whoever listens: a terminal, a test, a notebook."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Listener = Callable[[dict[str, Any]], None]

_listeners: list[Listener] = []


@contextmanager
def listen(callback: Listener) -> Iterator[None]:
    """Call ``callback(event)`` for every event of the runs inside the block.

    An event is a dict with ``kind`` ("observe", "baseline", "propose", "trial", "commit", "done"),
    ``text`` for a person, and ``seconds`` spent of ``budget``. Where a trial ended, or a commit was refused,
    ``rule`` says by what.
    """
    _listeners.append(callback)
    try:
        yield
    finally:
        _listeners.remove(callback)


def emit(kind: str, text: str, **facts: Any) -> None:
    """Tell every listener; a listener that raises ends the run, as any error in the user's code does."""
    for listener in tuple(_listeners):
        listener({"kind": kind, "text": text, **facts})
