"""bfloat16: weights stored and arithmetic done in it, the model's interface unchanged."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kpt.specs import HardwareProfile, Observation, Skip, Undo, Variant
from kpt_plugin_cpu.casting import cast_calls, cast_weights, wide_dtype
from kpt_plugin_cpu.estimates import gain_of_dtype


class Bf16:
    """The `Pass` of the policy."""

    def __init__(self) -> None:
        self.replaced = 0

    def propose(self, observation: Observation, hardware: HardwareProfile) -> Iterator[Variant | Skip]:
        if "bfloat16" not in hardware.native_dtypes:
            yield Skip("this CPU has no bfloat16 instructions")
        elif not observation.parameter_dtypes & {"float32", "float64"}:
            yield Skip("the model has no float32 weights")
        elif wide_dtype(observation.model) is None:
            yield Skip("the model has float32 and float64 weights: which outputs are float64 is not known")
        else:
            yield Variant(
                "cast",
                predicted_gain=gain_of_dtype(observation, hardware, "bfloat16"),
                setup_seconds=observation.parameter_bytes / max(hardware.bandwidth, 1e9),
                compute_dtype="bfloat16",
                derives=True,
            )

    def apply(self, model: torch.nn.Module, variant: Variant) -> Undo:
        wide = wide_dtype(model) or torch.float32
        self.replaced, put_back = cast_weights(model, torch.bfloat16)
        unwrap = cast_calls(model, torch.bfloat16, wide)

        def undo() -> None:
            unwrap()
            put_back()

        return undo

    def verify_applied(self, model: torch.nn.Module) -> bool:
        return self.replaced > 0
