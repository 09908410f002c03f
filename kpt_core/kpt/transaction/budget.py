"""The time that a run may take, as one clock that every stage reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kpt import compiling


class BudgetSpent(Exception):
    """There is no time left for another stage."""


class Budget:
    """``seconds`` from construction on; ``clock`` is replaced in tests."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._start = clock()
        self._beyond = 0.0

    def restart(self) -> None:
        """All of it again: what went by was spent waiting for another process."""
        self._start = self._clock()

    def spent(self) -> float:
        return self._clock() - self._start

    def left(self) -> float:
        return max(0.0, self.seconds + self._beyond - self.spent())

    @contextmanager
    def overtime(self, seconds: float) -> Iterator[None]:
        """So many seconds more within the block."""
        self._beyond = seconds
        try:
            yield
        finally:
            self._beyond = 0.0

    @contextmanager
    def limit(self, seconds: float | None = None) -> Iterator[None]:
        """End the block with `compiling.DeadlinePassed` when the budget, or ``seconds``, is spent."""
        allowed = self.left() if seconds is None else min(seconds, self.left())
        if allowed <= 0.0:
            raise BudgetSpent(f"the budget of {self.seconds:.0f} s is spent")
        with compiling.deadline(allowed):
            yield
