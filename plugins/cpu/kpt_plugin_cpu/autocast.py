"""Training steps under autocast: products in bfloat16, weights and their gradients in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kpt.specs import HardwareProfile, Observation, Skip, Undo, Variant, replace_forward
from kpt_plugin_cpu.casting import widened
from kpt_plugin_cpu.estimates import gain_of_dtype

#: What a step reads and writes to cast each weight, and its gradient back: times the bytes of a weight. One
#: that is used several times in a step is cast as often, which is not counted.
_CASTS = 3.0


class Autocast:
    """Enters `torch.autocast` around the forward, outside of whatever compiles it; outputs stay in float32.

    Operators go by PyTorch's lists for CPUs: products and convolutions in bfloat16, losses and decompositions
    in float32, all else in the dtype of its inputs.
    """

    def __init__(self) -> None:
        self.calls = 0

    def propose(self, observation: Observation, hardware: HardwareProfile) -> Iterator[Variant | Skip]:
        if "bfloat16" not in hardware.native_dtypes:
            yield Skip("this CPU has no bfloat16 instructions")
        elif "float32" not in observation.parameter_dtypes:
            yield Skip("the model has no float32 weights")
        elif others := observation.parameter_dtypes & {"float64", "bfloat16", "float16"}:
            yield Skip(f"the model has weights in {min(others)}, too: which outputs are in it is not known")
        elif observation.ambient and observation.ambient[0]:
            yield Skip("the steps run under an autocast of your own")
        else:
            total = observation.baseline_seconds or 1e-3
            after = total / gain_of_dtype(observation, hardware, "bfloat16", rest="float32")
            after += _CASTS * observation.parameter_bytes / max(hardware.bandwidth, 1e9)
            yield Variant(
                "bfloat16", predicted_gain=total / after, compute_dtype="bfloat16", reproducible=True
            )

    def apply(self, model: torch.nn.Module, variant: Variant) -> Undo:
        inner = model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            # Cast weights are kept until no autocast is entered any more, one that is switched off included:
            # steps inside of one would go on with the first step's.
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                output = inner(*args, **kwargs)
            return widened(output, torch.bfloat16, torch.float32)

        return replace_forward(model, forward)

    def verify_applied(self, model: torch.nn.Module) -> bool:
        return self.calls > 0
