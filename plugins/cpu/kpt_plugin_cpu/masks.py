"""Leaving out an attention mask that masks nothing.

An all-ones mask costs a model its construction, an addition to every score, and the fused attention's
fast path. Whether it masks anything is looked at on each call; one that does takes the usual way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kpt.specs import HardwareProfile, Observation, Skip, Undo, Variant, replace_forward
from kpt_plugin_cpu.estimates import compile_seconds, matmul_seconds


class DropMask:
    """Calls the model without the mask where every position counts."""

    def __init__(self) -> None:
        self.dropped = 0
        self.kept = 0

    def propose(self, observation: Observation, hardware: HardwareProfile) -> Iterator[Variant | Skip]:
        masks = sequence_masks(observation)
        if not masks:
            yield Skip("no input is a padding mask")
            return
        name = masks[0]
        full = [call for call in observation.calls if masks_nothing(call.kwargs[name])]
        if not full:
            yield Skip(f"{name} masks something in every example")
            return
        rest = observation.baseline_seconds - matmul_seconds(observation, hardware, "float32")
        share = 0.1 * rest / max(observation.baseline_seconds, 1e-9) * len(full) / len(observation.calls)
        yield Variant(
            "all-ones",
            {"mask": name},
            1.0 / (1.0 - min(share, 0.2)) + 0.02,
            # Calls with and without the mask are two graphs: a compiled plan is set up twice.
            compile_seconds(observation),
            sites=("",),
            touches_mask=True,
        )

    def apply(self, model: torch.nn.Module, variant: Variant) -> Undo:
        name, inner = variant.params["mask"], model.forward

        def forward(**kwargs: Any) -> Any:
            mask = kwargs.get(name)
            if mask is not None and masks_nothing(mask):
                self.dropped += 1
                return inner(**{key: value for key, value in kwargs.items() if key != name})
            self.kept += 1
            return inner(**kwargs)

        return replace_forward(model, forward)

    def verify_applied(self, model: torch.nn.Module) -> bool:
        return self.dropped > 0


def sequence_masks(observation: Observation, *, kept: int = 1) -> list[str]:
    """Names of keyword arguments that are [batch, sequence] masks with ``kept`` for what counts.

    Every example's mask must hold zeros and ones (or flags) alone: larger numbers tell segments apart.
    """
    names = []
    for leaf in observation.spec.leaves:
        if leaf.role != "mask" or len(leaf.shape) != 2 or leaf.dtype.is_floating_point:
            continue
        if leaf.form.kept != kept:
            continue
        masks = [call.kwargs.get(leaf.name) for call in observation.calls]
        if all(isinstance(mask, torch.Tensor) and is_flags(mask) for mask in masks):
            names.append(leaf.name)
    return names


def is_flags(mask: torch.Tensor) -> bool:
    """Whether ``mask`` holds only zeros and ones (or is boolean)."""
    return mask.dtype is torch.bool or bool(((mask == 0) | (mask == 1)).all())


def masks_nothing(mask: torch.Tensor) -> bool:
    """Whether every position counts, as one and the same segment: all are 1 (or True)."""
    return bool((mask == 1).all())
