"""What kernels' ``predict`` may return, and how it may fail."""

from __future__ import annotations

import sys
from typing import Any


def threefold(observation: Any, hardware: Any, sites: tuple[Any, ...]) -> float:
    assert observation.operations >= 0 and hardware.name and all(site.op == "rms_norm" for site in sites)
    return 3.0


def half(observation: Any, hardware: Any, sites: tuple[Any, ...]) -> float:
    return 0.5


def raising(observation: Any, hardware: Any, sites: tuple[Any, ...]) -> float:
    raise LookupError("no table for this machine")


def leaving(observation: Any, hardware: Any, sites: tuple[Any, ...]) -> float:
    sys.exit(3)


def words(observation: Any, hardware: Any, sites: tuple[Any, ...]) -> Any:
    return "a lot"


def nothing(observation: Any, hardware: Any, sites: tuple[Any, ...]) -> Any:
    return float("nan")


#: The seconds and operations of a call that `Listens` was told.
told: list[tuple[float, float]] = []


class Listens:
    """A pass that offers nothing."""

    def propose(self, observation, hardware):
        told.append((observation.baseline_seconds, observation.operations))
        return iter(())

    def apply(self, model, variant):
        raise AssertionError("nothing was proposed")
