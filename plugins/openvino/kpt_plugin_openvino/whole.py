"""The whole forward by OpenVINO: a second compiler for CPUs, that is ready in seconds."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from kpt.compiling import CompiledModule
from kpt.specs import Skip, Variant
from kpt_plugin_cpu import estimates
from kpt_plugin_cpu.inductor import declared_dims, dims_of
from kpt_plugin_openvino.lowering import lower

if TYPE_CHECKING:
    from kpt.specs import HardwareProfile, Observation, Undo

#: Share of a compiler's time that it takes: 3 s of 17 for BERT-base on an Emerald Rapids.
_SHARE = 0.3
#: Packing reads each weight, writes it and reorders it: times that it is read, about.
_PACKING = 4.0
#: What is left of what a call does besides products: it fuses as compilers do, and calls no Python between.
_REST = 0.9 * estimates.FUSED


class OpenVino:
    """Replaces forwards by the graph that dynamo captured, compiled by OpenVINO."""

    def __init__(self) -> None:
        self.compiled: CompiledModule | None = None

    def propose(self, observation: Observation, hardware: HardwareProfile) -> Iterator[Variant | Skip]:
        reason = unavailable()
        if reason is not None:
            yield Skip(reason)
            return
        if observation.objective == "memory":
            yield Skip("it holds a copy of the weights in memory of its own")
            return
        others = observation.parameter_dtypes - {"float32", "bfloat16"}
        if others or not observation.parameter_dtypes:
            found = ", ".join(sorted(others)) or "none"
            yield Skip(f"weights in float32 or bfloat16 are expected, the model's are: {found}")
            return
        if "bfloat16" in observation.parameter_dtypes and "bfloat16" not in hardware.native_dtypes:
            yield Skip("the model is in bfloat16, and this CPU has no arithmetic for it")
            return
        faster = 1.0
        if not estimates.in_bfloat16(observation):
            faster = max(estimates.rate_ratio(hardware, estimates.ONEDNN), 1.0)
        alone = estimates.estimate(observation, hardware).gain(rate_ratio=faster, rest_ratio=_REST)
        read = _PACKING * observation.parameter_bytes
        yield Variant(
            "whole",
            {"dims": declared_dims(observation)},
            alone * estimates.gain_of_packing(observation, hardware),  # it packs whatever it multiplies by
            _SHARE * estimates.compile_seconds(observation) + read / max(hardware.bandwidth, 1e9),
            derives=True,
        )

    def apply(self, model: torch.nn.Module, variant: Variant) -> Undo:
        own = frozenset(id(tensor) for tensor in (*model.parameters(), *model.buffers()))
        compiled = CompiledModule(
            model,
            backend=functools.partial(lower, own=own),
            dynamic_dims=dims_of(variant.params),
        )
        self.compiled = compiled
        return compiled.dispose

    def verify_applied(self, model: torch.nn.Module) -> bool:
        return self.compiled is not None and self.compiled.ran

    def effect(self) -> str:
        return self.compiled.told if self.compiled is not None else ""


def unavailable() -> str | None:
    """Why OpenVINO can't be used here, or None."""
    try:
        import openvino  # noqa: F401
        from openvino.frontend.pytorch import ts_decoder  # noqa: F401
    except Exception as error:  # noqa: BLE001 - a broken installation raises what it likes
        return f"OpenVINO can't be imported ({type(error).__name__}: {error}); pip install openvino"
    return None
