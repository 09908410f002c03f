"""Predicted gains, from measured rates and what was observed of the model.

A call's eager time is split into matrix products (operations / the rate of eager's library) and the
rest: elementwise work, normalisation, softmax and dispatch. A variant changes the rate of the one and
the memory traffic of the other. These are estimates that order trials; the clock decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kpt.specs import HardwareProfile
    from kpt.transaction.observe import Observation

#: Share of the rest that is left when a compiler fuses it: measured 0.35 to 0.6 on encoders.
FUSED = 0.5
#: Seconds of Python and dispatch for one operator in eager mode.
DISPATCH = 6e-6


@dataclass(frozen=True)
class Estimate:
    """Seconds of one eager call: ``products`` in matrix products, ``rest`` in everything else."""

    products: float
    rest: float

    @property
    def total(self) -> float:
        return self.products + self.rest

    def gain(self, *, rate_ratio: float = 1.0, rest_ratio: float = 1.0) -> float:
        """Eager time over the time with products ``rate_ratio`` faster and the rest cut to ``rest_ratio``."""
        after = self.products / max(rate_ratio, 1e-3) + self.rest * rest_ratio
        return self.total / after if after > 0 else 1.0


def eager_rate(hardware: HardwareProfile) -> float:
    """Operations per second of eager's fp32 matrix products."""
    libraries = hardware.details.get("float32_rates") or {}
    return float(libraries.get("eager") or hardware.matmul_rates.get("float32") or 0.0)


def estimate(observation: Observation, hardware: HardwareProfile) -> Estimate:
    """The split of one eager call; without measured rates half of it counts as products."""
    total = observation.baseline_seconds or 1e-3
    rate = eager_rate(hardware)
    products = observation.operations / rate if rate and observation.operations else 0.5 * total
    # Rates are measured at one size; small or skinny products run below them.
    products = min(products, 0.95 * total)
    return Estimate(products, total - products)


def rate_ratio(hardware: HardwareProfile, dtype: str) -> float:
    """How much faster than eager fp32 the best products in ``dtype`` are; 1.0 where not measured."""
    rate, eager = hardware.matmul_rates.get(dtype, 0.0), eager_rate(hardware)
    return rate / eager if rate and eager else 1.0


def onednn_ratio(hardware: HardwareProfile) -> float:
    """How much faster oneDNN's fp32 products are than eager's; 0.0 where oneDNN is missing."""
    libraries = hardware.details.get("float32_rates") or {}
    if "onednn" not in libraries:
        return 0.0 if libraries else 1.0
    return float(libraries["onednn"]) / (eager_rate(hardware) or 1.0)


def modules_with_work(observation: Observation) -> int:
    """Modules that hold parameters themselves: a measure of how long a model takes to compile."""
    return sum(1 for module in observation.model.modules() if next(module.parameters(False), None) is not None)
