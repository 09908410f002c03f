"""The cpu plugin's compiler with one variant of it, for tests that need a compiled plan and no contest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import kpt
from kpt.specs import PassSpec, Variant
from kpt_plugin_cpu.inductor import Inductor


class Frozen(Inductor):
    """Compiles the whole forward once, with its weights frozen into the code."""

    def propose(self, observation: Any, hardware: Any) -> Iterator[Variant]:
        for offer in super().propose(observation, hardware):
            if isinstance(offer, Variant) and offer.name == "frozen":
                yield offer


class CompilerAndMasks:
    """That compiler beside what the cpu plugin does about padding."""

    @kpt.hookimpl
    def kpt_passes(self) -> Iterator[PassSpec]:
        yield PassSpec("frozen", "compile", "few_variants:Frozen")
        yield PassSpec("drop-mask", "shapes", "kpt_plugin_cpu.masks:DropMask", priority=1)
        yield PassSpec("pack-padding", "shapes", "kpt_plugin_cpu.packing:PackPadding", priority=2)
