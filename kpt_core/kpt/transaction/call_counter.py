"""Counters that threads share without a lock."""

from __future__ import annotations

import itertools


class Counter:
    """Counts by reason, from any thread without a lock."""

    def __init__(self) -> None:
        self._counts: dict[str, itertools.count[int]] = {}

    def add(self, reason: str) -> None:
        counter = self._counts.get(reason)
        if counter is None:
            counter = self._counts.setdefault(reason, itertools.count())
        next(counter)

    def to_dict(self) -> dict[str, int]:
        return {reason: peek(counter) for reason, counter in sorted(self._counts.items())}

    def total(self) -> int:
        return sum(self.to_dict().values())


def peek(counter: itertools.count[int]) -> int:
    """What ``counter`` gives next."""
    return int(repr(counter)[6:-1])
