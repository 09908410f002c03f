"""A cautious precision policy that takes its time, and a bold one that promises more and never ends."""

from __future__ import annotations

import time
from typing import Any

import torch

from kpt.specs import Variant
from mixed_models import HalfWide


class Cautious(HalfWide):
    variant = Variant(
        "half", predicted_gain=2.0, sites=(), compute_dtype="bfloat16", derives=True, setup_seconds=2.0
    )

    def apply(self, model: torch.nn.Module, variant: Variant) -> Any:
        time.sleep(2.0)
        return super().apply(model, variant)


class Bold(HalfWide):
    variant = Variant(
        "stuck", predicted_gain=9.0, sites=(), compute_dtype="int8", derives=True, setup_seconds=4.0
    )

    def apply(self, model: torch.nn.Module, variant: Variant) -> Any:
        while True:
            time.sleep(0.01)
