"""One pair of timed spans: the same fresh calls on both sides, in random order."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from kpt.judge.calls import Call
from kpt.judge.load import Issue, one_by_one

#: Seconds for which threads of one library may go on looking for work when a call has ended (libgomp's, and
#: with it torch's): a call of another library that comes next has fewer cores as long. 2.8 ms were seen.
SETTLE_SECONDS = 4e-3
#: Calls this many times as long are timed as they come: it is a few percent of them.
SETTLED = 16
#: How many times as long the calls of one side may be for both sides to be treated alike.
_COMPARABLE = 4.0
#: Calls before a span at most: more of so short ones would take longer to make than to run.
_MOST_CALLS = 64


def settling(device_type: str) -> float:
    """``settle`` for calls on a device: threads of libraries compete for the cores of a CPU."""
    return SETTLE_SECONDS if device_type == "cpu" else 0.0


def settling_calls(known: tuple[float, float], settle: float) -> tuple[int, int]:
    """How many calls of its own each side makes before its spans, by the seconds that one takes.

    Both sides where either needs it, as what comes first also warms the caches; not a side that takes
    `_COMPARABLE` times as long as what needs it at most. None before it is known how long a call takes.
    """
    most = SETTLED * settle
    if not 0.0 < min(known) < most:
        return 0, 0
    calls = [min(math.ceil(settle / each), _MOST_CALLS) if each < _COMPARABLE * most else 0 for each in known]
    return calls[0], calls[1]


def pair(
    sides: tuple[Callable[..., Any], Callable[..., Any]],
    next_call: Callable[[], Call],
    repeats: int,
    order: random.Random,
    wait: Callable[[], None],
    flush: Callable[[], None] | None,
    timer: Callable[[], float],
    issue: Issue,
    settle: tuple[int, int],
) -> tuple[float, float]:
    """Seconds per call of both sides on the same fresh calls, each after so many that ``settle``."""
    drawn = [next_call() for _ in range(repeats)]
    first = order.randrange(2)
    calls = drawn, _copies(drawn)
    before = [_copies([drawn[0]] * settle[number]) for number in (first, 1 - first)]
    seconds = []
    for number, own, ahead in zip((first, 1 - first), calls, before):
        one_by_one(sides[number], ahead)
        seconds.append(span(sides[number], own, wait, flush, timer, issue))
    return (seconds[0], seconds[1]) if first == 0 else (seconds[1], seconds[0])


def _copies(calls: Sequence[Call]) -> list[Call]:
    return [call.clone() if isinstance(call, Call) else call for call in calls]


def span(
    function: Callable[..., Any],
    calls: Sequence[Call],
    wait: Callable[[], None],
    flush: Callable[[], None] | None,
    timer: Callable[[], float],
    issue: Issue = one_by_one,
) -> float:
    """Seconds per call over ``calls``."""
    if flush is not None:
        flush()
    wait()
    start = timer()
    issue(function, calls)
    wait()
    return (timer() - start) / len(calls)
