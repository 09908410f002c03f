"""What the rocm plugin offers; nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterator

from kpt import hookimpl
from kpt.specs import HardwareSpec, PassSpec


@hookimpl
def kpt_hardware() -> Iterator[HardwareSpec]:
    yield HardwareSpec("rocm", "cuda", "kpt_plugin_rocm.probe:RocmProbe", priority=10)


@hookimpl
def kpt_passes() -> Iterator[PassSpec]:
    yield PassSpec(
        "tunable-gemm",
        "runtime",
        "kpt_plugin_rocm.tunable:TunableGemm",
        modes=("inference", "training"),
        hardware=("rocm",),
    )
