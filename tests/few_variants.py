"""Passes of the cpu plugin with one variant of each, for tests that need a compiled plan and no contest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import kpt
from kpt.specs import PassSpec, Variant
from kpt_plugin_cpu.captured import Captured
from kpt_plugin_cpu.inductor import Inductor


class _One(Inductor):
    """Proposes the variant of its ``name`` only."""

    name = ""

    def propose(self, observation: Any, hardware: Any) -> Iterator[Variant]:
        for offer in super().propose(observation, hardware):
            if isinstance(offer, Variant) and offer.name == self.name:
                yield offer


class Frozen(_One):
    """Compiles the whole forward once, with its weights frozen into the code."""

    name = "frozen"


class Live(_One):
    """Compiles the whole forward once, which reads its weights on each call."""

    name = "live"


class Repeated(_One):
    """Compiles one block for all, with packed weights."""

    name = "repeated blocks"


class Packed(Captured):
    """Captures the graph and packs its weights, whatever was measured."""

    def propose(self, observation: Any, hardware: Any) -> Iterator[Variant]:
        yield Variant("whole, packed weights", {"dims": {}, "packs": True}, 5.0, derives=True)


class CompilerAndMasks:
    """That compiler beside what the cpu plugin does about padding."""

    @kpt.hookimpl
    def kpt_passes(self) -> Iterator[PassSpec]:
        yield PassSpec("frozen", "compile", "few_variants:Frozen")
        yield PassSpec("drop-mask", "shapes", "kpt_plugin_cpu.masks:DropMask", priority=1)
        yield PassSpec("pack-padding", "shapes", "kpt_plugin_cpu.packing:PackPadding", priority=2)
