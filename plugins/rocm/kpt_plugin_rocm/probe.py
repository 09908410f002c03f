"""AMD GPUs: told apart from NVIDIA's by torch's build, described by the driver, measured with torch."""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kpt.specs import HardwareProfile
from kpt_plugin_rocm import topology
from kpt_plugin_rocm.architectures import architecture


class RocmProbe:
    """Reads torch's build and the driver's topology; no device is initialised by `detect`."""

    def detect(self) -> HardwareProfile | str:
        hip = hip_version()
        if hip is None:
            return "torch is not installed, or no ROCm build (torch.version.hip is None)"
        nodes = topology.gpus()
        if not nodes:
            return "the amdgpu driver lists no GPU"
        return describe(nodes, hip)

    def measure(self, profile: HardwareProfile) -> HardwareProfile:
        """Copy bandwidth and matmul rates of the current device; about two seconds."""
        return replace(profile, bandwidth=_bandwidth(), matmul_rates=_rates(profile.native_dtypes))


def hip_version() -> str | None:
    """``torch.version.hip``, read from torch's own file where torch is not imported yet: listing plugins
    must not load it. None without torch, and for builds for other devices.
    """
    loaded = sys.modules.get("torch")
    if loaded is not None:
        return getattr(loaded.version, "hip", None)
    package = find_spec("torch")
    if package is None or package.origin is None:
        return None
    try:
        text = (Path(package.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"""^hip\b[^=]*=\s*['"]([^'"]+)['"]""", text, re.MULTILINE)
    return found[1] if found else None


def describe(nodes: list[topology.Node], hip: str) -> HardwareProfile:
    """The profile of the first of ``nodes``, which torch calls device 0."""
    first = nodes[0]
    facts = architecture(first.gfx, first.wavefront, first.lds)
    links = {
        str(other): f"xgmi {bandwidth} MB/s" if bandwidth else "xgmi"
        for other, bandwidth in sorted(first.links.items())
    }
    features = ["mfma"] if facts.name in ("gfx90a", "gfx942", "gfx950") else []
    if facts.fp8:
        features.append(f"fp8-{facts.fp8}")
    return HardwareProfile(
        name="rocm",
        device_type="cuda",  # what torch calls it, in a ROCm build too
        vendor="amd",
        architecture=facts.name,
        compute_units=first.compute_units,
        memory_bytes=first.memory,
        native_dtypes=(*facts.matrix_dtypes, *facts.fp8_dtypes),
        features=tuple(features),
        caches={"lds": first.lds},
        links=links,
        triton_target=f"hip:{facts.name}:{facts.wavefront}",
        details={"family": facts.family, "wavefront": facts.wavefront, "hip": hip, "devices": len(nodes)},
    )


def _seconds(call: Callable[[], Any], repeats: int = 10) -> float:
    import torch

    for _ in range(3):
        call()
    samples = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(samples)


def _bandwidth() -> float:
    """Bytes per second of a copy of half a gibibyte on the device, read and written."""
    import torch

    source = torch.empty(2**29, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source))


def _rates(dtypes: tuple[str, ...], size: int = 4096) -> dict[str, float]:
    """Operations per second of square products, for the dtypes that torch multiplies."""
    import torch

    found: dict[str, float] = {}
    for name in dtypes:
        if name in ("float32", "float16", "bfloat16"):
            call = _product(getattr(torch, name), size)
        elif name.startswith("float8_e4m3"):
            call = _scaled_product(getattr(torch, name), size)
        else:
            continue
        found[name] = 2 * size**3 / _seconds(call)
    return found


def _product(dtype: Any, size: int) -> Callable[[], Any]:
    import torch

    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    return lambda: a @ b


def _scaled_product(dtype: Any, size: int) -> Callable[[], Any]:
    import torch

    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    one = torch.ones((), device="cuda")
    return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)
