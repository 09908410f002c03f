"""Another number of threads during the call: small models lose time on waking threads up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kpt.specs import HardwareProfile, Observation, Skip, Undo, Variant, replace_forward

#: Above this latency (seconds) waking threads costs nothing that could be measured.
_SMALL = 5e-3


class Threads:
    """Sets torch's thread count around the call and puts it back.

    The count is the process's: calls from other threads during the call see it too.
    """

    def __init__(self) -> None:
        self.calls = 0

    def propose(self, observation: Observation, hardware: HardwareProfile) -> Iterator[Variant | Skip]:
        now, cores = torch.get_num_threads(), hardware.compute_units or torch.get_num_threads()
        offered = False
        # Callers that share the cores anyway lose time on each other's threads, however long a call is.
        if now > 1 and (observation.baseline_seconds < _SMALL or observation.objective == "throughput"):
            offered = True
            yield Variant("1", {"threads": 1}, 1.05, reproducible=True)
        if now > cores:
            offered = True
            yield Variant(str(cores), {"threads": cores}, now / cores, reproducible=True)
        if not offered:
            yield Skip(f"torch uses {now} of {cores} cores, and a call is long enough to wake them")

    def apply(self, model: torch.nn.Module, variant: Variant) -> Undo:
        threads, inner = variant.params["threads"], model.forward
        get, put = torch.get_num_threads, torch.set_num_threads

        def forward(*args: Any, **kwargs: Any) -> Any:
            before = get()
            if before == threads:
                return inner(*args, **kwargs)
            put(threads)
            try:
                self.calls += 1
                return inner(*args, **kwargs)
            finally:
                put(before)

        return replace_forward(model, forward)

    def verify_applied(self, model: torch.nn.Module) -> bool:
        return self.calls > 0
