"""Calls that arrive at once, and calls that are queued."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from kpt.judge.calls import Call
from kpt.judge.clock import cache_flusher, paired
from kpt.judge.load import ONE_BY_ONE, Load


def calls(number: int) -> list[Call]:
    return [Call((torch.tensor(float(index)),)) for index in range(number)]


def test_callers_are_inside_the_function_at_the_same_time_and_every_call_is_made_once() -> None:
    meeting = threading.Barrier(3, timeout=10.0)
    seen: list[float] = []

    def function(x: torch.Tensor) -> None:
        meeting.wait()
        seen.append(float(x))

    with Load(callers=3, queued=2).issuing() as issue:
        issue(function, calls(6))
        assert sorted(seen) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kpt-caller")]


def test_one_caller_is_the_thread_that_asks() -> None:
    threads: list[threading.Thread] = []
    with ONE_BY_ONE.issuing() as issue:
        issue(lambda x: threads.append(threading.current_thread()), calls(2))
    assert threads == [threading.current_thread()] * 2


def test_what_a_call_raises_reaches_the_one_who_measures() -> None:
    def function(x: torch.Tensor) -> None:
        if float(x) == 3.0:
            raise LookupError("call three")

    with Load(2, 2).issuing() as issue, pytest.raises(LookupError, match="call three"):
        issue(function, calls(4))


@pytest.mark.parametrize("inference", [False, True])
def test_callers_compute_in_the_mode_of_the_thread_that_asks(inference: bool) -> None:
    seen: list[bool] = []
    with Load(2).issuing() as issue, torch.inference_mode(inference):
        issue(lambda x: seen.append(torch.is_inference_mode_enabled()), calls(2))
    assert seen == [inference] * 2


def test_a_queue_is_waited_for_once_and_each_side_gets_every_call() -> None:
    events: list[str] = []

    def side(name: str) -> Any:
        return lambda x: events.append(name)

    timing = paired(
        side("b"),
        side("c"),
        lambda: Call((torch.zeros(1),)),
        seconds=0.0,
        min_pairs=3,
        synchronize=lambda: events.append("wait"),
        load=Load(1, 8),
    )
    assert timing.repeats % 8 == 0
    spans = [span.split() for span in " ".join(events).split("wait") if span.strip()]
    assert all(len(span) >= 8 and len(set(span)) == 1 for span in spans)


def test_caches_are_flushed_between_single_calls_only() -> None:
    with pytest.raises(ValueError, match="one call at a time"):
        paired(print, print, lambda: calls(1)[0], flush=cache_flusher(1), load=Load(2))
    with pytest.raises(ValueError, match="at least one caller"):
        Load(callers=0)
