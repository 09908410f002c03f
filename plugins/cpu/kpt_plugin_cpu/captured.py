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
from kpt_plugin_cpu.inductor import declared_dims, settings
from kpt_plugin_cpu.multihead import written_out

if TYPE_CHECKING:
    from kpt.specs import HardwareProfile, Observation, Undo

#: Share of the time of a compiler that capturing takes: from 2 s of 54 to 8 s of 26 were measured.
_SHARE = 0.15
#: The share of a call that has to be left out for a trial, and the largest that is predicted.
_LEAST, _MOST = 0.05, 0.2


class Captured:
    """Replaces the root's forward by its captured graph. Live weights are read on each call."""

    def __init__(self) -> None:
        self.compiled: CompiledModule | None = None

    def propose(self, observation: Observation, hardware: HardwareProfile) -> Iterator[Variant | Skip]:
        share = estimates.seconds_per_module(observation) / max(observation.baseline_seconds, 1e-9)
        if share < _LEAST:
            yield Skip(f"about {share:.1%} of a call is Python between operations: too little to gain from")
            return
        yield Variant(
            "whole",
            {"dims": declared_dims(observation)},
            1.0 / (1.0 - min(share, _MOST)),
            _SHARE * estimates.compile_seconds(observation),
            reproducible=True,
        )

    def apply(self, model: torch.nn.Module, variant: Variant) -> Undo:
        dims = settings(variant.params)["dynamic_dims"]
        self.compiled = CompiledModule(model, backend="eager", dynamic_dims=dims, graph_pass=written_out)
        return self.compiled.dispose

    def verify_applied(self, model: torch.nn.Module) -> bool:
        return self.compiled is not None and self.compiled.ran

    def effect(self) -> str:
        return self.compiled.told if self.compiled is not None else ""
