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
