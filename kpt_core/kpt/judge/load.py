"""How calls arrive while they are timed: one after another, queued for a device, or from several threads."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kpt.judge.calls import Call

#: Seconds that the end of a measurement waits for calls that are still running.
_PATIENCE = 1.0
#: Runs calls with one function, all of them before it returns.
Issue = Callable[[Callable[..., Any], Sequence[Call]], None]


@dataclass(frozen=True)
class Load:
    """``callers`` threads call at once, each ``queued`` times before the device is waited for.

    One caller that waits after each call measures latency. Several callers, or several calls in a queue,
    measure throughput: what one call does on the host while another one computes is not counted twice.
    """

    callers: int = 1
    queued: int = 1

    def __post_init__(self) -> None:
        if self.callers < 1 or self.queued < 1:
            raise ValueError(f"expected at least one caller and one call, got {self.callers}, {self.queued}")

    @property
    def calls(self) -> int:
        """How many calls one timed span holds at least."""
        return self.callers * self.queued

    @contextmanager
    def issuing(self) -> Iterator[Issue]:
        """What runs calls as this load says, for as long as the block lasts."""
        if self.callers == 1:
            yield one_by_one
            return
        team = _Team(self.callers)
        try:
            yield team.issue
        finally:
            team.dismiss()


ONE_BY_ONE = Load()


def one_by_one(function: Callable[..., Any], calls: Sequence[Call]) -> None:
    """Run ``calls`` in this thread."""
    for call in calls:
        function(*call.args, **call.kwargs)


class _Team:
    """Threads that wait for a share of calls each.

    They are daemons and take no new call once they are dismissed: a call that never returns outlives the
    team, but keeps neither the caller waiting nor the process alive.
    """

    def __init__(self, number: int) -> None:
        self._shares: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(number)]
        self._ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._dismissed = threading.Event()
        self._threads = [
            threading.Thread(target=self._serve, args=(shares,), name=f"kpt-caller-{index}", daemon=True)
            for index, shares in enumerate(self._shares)
        ]
        for thread in self._threads:
            thread.start()

    def issue(self, function: Callable[..., Any], calls: Sequence[Call]) -> None:
        """Every call in one of the threads, as many at once as there are threads.

        Raises:
            BaseException: what the first call that failed raised, after all threads have ended their share.
        """
        number = len(self._shares)
        inference = torch.is_inference_mode_enabled()
        for index, shares in enumerate(self._shares):
            shares.put((function, calls[index::number], inference))
        failed = [error for error in [self._ended.get() for _ in range(number)] if error is not None]
        if failed:
            raise failed[0]

    def dismiss(self) -> None:
        """Let the threads end; one that is inside a call for longer ends after it."""
        self._dismissed.set()
        for shares in self._shares:
            shares.put(None)
        patience = time.monotonic() + _PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, patience - time.monotonic()))

    def _serve(self, shares: queue.SimpleQueue[Any]) -> None:
        while (share := shares.get()) is not None:
            function, calls, inference = share
            try:
                with torch.inference_mode(inference):
                    for call in calls:
                        if self._dismissed.is_set():
                            break
                        function(*call.args, **call.kwargs)
            except BaseException as error:  # noqa: BLE001 - it is raised where the calls were issued
                self._ended.put(error)
            else:
                self._ended.put(None)
            del share, function, calls
