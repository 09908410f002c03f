"""What a device is, and how a plugin finds and measures one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class HardwareProfile:
    """Facts about one device. Rates are measured on it, never taken from a table.

    ``bandwidth`` is bytes per second of a device copy (bytes read + bytes written);
    ``matmul_rates`` maps a dtype name to floating (or integer) operations per second;
    ``native_dtypes`` are the dtypes that the device multiplies in hardware.
    """

    name: str
    device_type: str
    vendor: str = "unknown"
    architecture: str = "unknown"
    compute_units: int = 0
    memory_bytes: int = 0
    bandwidth: float = 0.0
    matmul_rates: Mapping[str, float] = field(default_factory=dict)
    native_dtypes: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    caches: Mapping[str, int] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    triton_target: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def predicted_seconds(self, bytes_moved: float, operations: float, dtype: str) -> float:
        """Roofline time in seconds of ``operations`` in ``dtype`` that move ``bytes_moved`` bytes."""
        rate = self.matmul_rates.get(dtype) or self.matmul_rates.get("float32") or 0.0
        memory = bytes_moved / self.bandwidth if self.bandwidth else 0.0
        return max(memory, operations / rate if rate else 0.0)


@dataclass(frozen=True)
class HardwareSpec:
    """One kind of device. ``probe`` names a `Probe`."""

    name: str
    device_type: str
    probe: str
    priority: int = 0


class Probe(Protocol):
    """Finds one kind of device without initialising it, and measures it on request."""

    def detect(self) -> HardwareProfile | str:
        """The profile without measured rates, or the reason why the device is absent."""

    def measure(self, profile: HardwareProfile) -> HardwareProfile:
        """The same profile with measured bandwidth and matmul rates."""
