"""One op at one size, with everyone who can compute it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

#: Prepares a contender (imports, compiles, allocates) and returns the call to time.
Prepare = Callable[[], Callable[[], Any]]


@dataclass(frozen=True)
class Case:
    """One row of the result file.

    ``amount`` is the fewest bytes that a call must move (unit "GB/s") or its floating-point operations
    (unit "TFLOP/s"); for the unit "ms" it is not used. ``contenders`` maps a name to a function that
    prepares that contender; one that cannot run here raises, and its reason goes into the result file.
    ``kpt`` has to be among them. All contenders' calls compute the same thing from equal inputs, drawn for
    each, and return their outputs (gradients included); the first call's are compared with ``reference``, a
    call that computes them in fp32 or better. ``graph`` times replays of a CUDA graph instead of eager calls.
    ``goal`` is in the unit; for "ms", smaller is better. ``ahead`` is a goal of another kind: a contender,
    and how many times as fast as that kpt should be. ``yardstick`` is what every contender does too, under
    its name, alone and timed as they are: for "GB/s" torch's copy of as many bytes, where nothing is said.
    ``rank`` orders cases where time is short, 0 first.
    """

    op: str
    size: str
    unit: str
    amount: float
    contenders: Mapping[str, Prepare]
    reference: Callable[[], Any] | None = None
    goal: float | None = None
    ahead: tuple[str, float] | None = None
    yardstick: tuple[str, Prepare] | None = None
    graph: bool = False
    memory: bool = False
    note: str = ""
    rank: int = 5
