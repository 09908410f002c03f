"""Compiled forwards: dynamo finds the graph once, and later calls run it without dynamo.

`torch.compile` keeps compiled code on code objects, compiles again whenever a guard fails, falls
back to eager without a word after eight entries, and evaluates every guard on each call. A
`CompiledForward` differs in four ways:

* Each instance traces a code object and a globals dictionary of its own; when it is disposed of,
  compiled code, guards and constants die with it. `torch._dynamo.reset` is never needed.
* Guards are *memoised*: the full set is evaluated when an input structure (shapes, strides, dtypes,
  values of scalars, grad mode) is first seen; afterwards one dictionary look-up selects the compiled
  code, which is called directly. Whoever calls guards the rest: module modes, hooks, weights, scalar
  attributes.
* After `seal` nothing is ever compiled: an unknown structure that satisfies the guards of existing
  code is memoised, any other one runs the original forward and is counted as a miss.
* Settings of the compiler hold during compilation only.
"""

from __future__ import annotations

from kpt.compiling.call_structure import named_tensors
from kpt.compiling.captured import CapturedForward, is_fused
from kpt.compiling.collecting import FurtherInputs, collect
from kpt.compiling.forwards import CompiledForward, executions_of_thread
from kpt.compiling.modules import CompiledModule
from kpt.compiling.padding import zero_padding
from kpt.compiling.repeats import RepeatedParts
from kpt.compiling.writes import memories, value_of, written_by
from kpt.interruption import DeadlinePassed, deadline, stop_workers

__all__ = [
    "CapturedForward",
    "CompiledForward",
    "CompiledModule",
    "DeadlinePassed",
    "FurtherInputs",
    "RepeatedParts",
    "collect",
    "deadline",
    "executions_of_thread",
    "is_fused",
    "memories",
    "named_tensors",
    "stop_workers",
    "value_of",
    "written_by",
    "zero_padding",
]
