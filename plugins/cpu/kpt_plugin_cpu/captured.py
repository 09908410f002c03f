"""The graph that dynamo captures, run as it is: without what Python does between the operations of a call.

It is ready in a fraction of the time of a compiler, and serves where that is not ready in time, as for models
that loop over the steps of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from kpt.compiling import CompiledModule
from kpt.specs import Skip, Variant
from kpt_plugin_cpu import estimates
from kpt_plugin_cpu.inductor import Passes, declared_dims, dims_of
from kpt_plugin_cpu.packed_weights import PackedWeights

if TYPE_CHECKING:
    from kpt.specs import HardwareProfile, Observation, Undo

#: Share of the time of a compiler that capturing takes: from 2 s of 54 to 8 s of 26 were measured.
_SHARE = 0.15
#: The share of a call that has to be left out for a trial, and the largest that is predicted.
_LEAST, _MOST = 0.05, 0.2
#: Packing reads each weight, writes it and reorders it: times that it is read, about.
_PACKING = 4.0


class Captured:
    """Replaces the root's forward by its captured graph.

    Live weights are read on each call; or linears in bfloat16 have copies of theirs, packed for oneDNN once.
    """

    def __init__(self) -> None:
        self.compiled: CompiledModule | None = None
        self.packed: PackedWeights | None = None

    def propose(self, observation: Observation, hardware: HardwareProfile) -> Iterator[Variant | Skip]:
        share = estimates.seconds_per_module(observation) / max(observation.baseline_seconds, 1e-9)
        without_python = 1.0 / (1.0 - min(share, _MOST))
        dims = {"dims": declared_dims(observation)}
        setup = _SHARE * estimates.compile_seconds(observation)
        if share < _LEAST:
            yield Skip(f"about {share:.1%} of a call is Python between operations: too little to gain from")
        else:
            yield Variant("whole", dims, without_python, setup, reproducible=True)
        packing = estimates.gain_of_packing(observation, hardware)
        if packing <= 1.0 or observation.training:
            if estimates.in_bfloat16(observation):
                yield Skip("packed weights: not faster by the measured rates, or training writes them")
            return
        bytes_read = _PACKING * observation.parameter_bytes
        yield Variant(
            "whole, packed weights",
            {**dims, "packs": True},
            without_python * packing,
            setup + bytes_read / max(hardware.bandwidth, 1e9),
            derives=True,
        )

    def apply(self, model: torch.nn.Module, variant: Variant) -> Undo:
        dims = dims_of(variant.params)
        packed: PackedWeights | None = None
        if variant.params.get("packs"):
            packed = PackedWeights(model, float32=False, compiled=False)
        self.packed = packed
        passes = Passes(None, packed)
        compiled = CompiledModule(model, backend="eager", dynamic_dims=dims, graph_pass=passes)
        self.compiled = compiled

        def undo() -> None:
            compiled.dispose()
            if packed is not None:
                packed.clear()

        return undo

    def verify_applied(self, model: torch.nn.Module) -> bool:
        ran = self.compiled is not None and self.compiled.ran
        return ran and (self.packed is None or bool(self.packed.packed))

    def effect(self) -> str:
        return self.compiled.told if self.compiled is not None else ""
