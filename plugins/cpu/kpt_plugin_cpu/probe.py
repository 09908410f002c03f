"""What CPU this is, how much of it this process may use, and how fast it really is."""

from __future__ import annotations

import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kpt.specs import HardwareProfile

_FEATURES = {
    "avx2": "avx2",
    "avx512f": "avx512",
    "avx512_vnni": "avx512-vnni",
    "avx_vnni": "avx-vnni",
    "avx512_bf16": "avx512-bf16",
    "avx512_fp16": "avx512-fp16",
    "amx_tile": "amx",
    "amx_bf16": "amx-bf16",
    "amx_int8": "amx-int8",
    "asimd": "neon",
    "sve": "sve",
    "sve2": "sve2",
    "bf16": "arm-bf16",
    "i8mm": "arm-i8mm",
}
_VENDORS = {"AuthenticAMD": "amd", "GenuineIntel": "intel", "0x41": "arm", "0xc0": "ampere"}
#: Seconds that one rate may take to measure.
_SPAN = 0.25


class CpuProbe:
    """Reads what the system says and measures the rest with torch."""

    def detect(self) -> HardwareProfile | str:
        facts = _cpuinfo()
        features = tuple(sorted(name for flag, name in _FEATURES.items() if flag in facts["flags"]))
        native = ["float32", "float64"]
        if {"avx512-bf16", "amx-bf16", "arm-bf16"} & set(features):
            native.append("bfloat16")
        if {"avx512-fp16"} & set(features):
            native.append("float16")
        if {"avx512-vnni", "avx-vnni", "amx-int8", "arm-i8mm"} & set(features):
            native.append("int8")
        return HardwareProfile(
            name="cpu",
            device_type="cpu",
            vendor=_VENDORS.get(facts["vendor"], facts["vendor"] or "unknown"),
            architecture=platform.machine(),
            compute_units=usable_cores(),
            memory_bytes=usable_memory(),
            native_dtypes=tuple(native),
            features=features,
            caches=_caches(),
            details={
                "model": facts["model"],
                "logical_cores": os.cpu_count() or 1,
                "cgroup_cores": quota_cores(),
            },
        )

    def measure(self, profile: HardwareProfile) -> HardwareProfile:
        """Bandwidth and matmul rates with as many threads as torch uses now; about two seconds."""
        return replace(profile, bandwidth=_bandwidth(), matmul_rates=_rates())


# ---------------------------------------------------------------------------------------------
# What the system says


def _cpuinfo() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "vendor": "",
        "model": platform.processor() or platform.machine(),
        "flags": set(),
    }
    path = Path("/proc/cpuinfo")
    if path.is_file():
        text = path.read_text(errors="replace")
        for key, names in (("vendor", ("vendor_id", "CPU implementer")), ("model", ("model name", "Model"))):
            for name in names:
                found = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
                if found:
                    facts[key] = found.group(1).strip()
                    break
        found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
        if found:
            facts["flags"] = set(found.group(1).split())
    elif sys.platform == "darwin":
        facts["vendor"] = "apple" if platform.machine() == "arm64" else "intel"
        facts["flags"] = {"asimd"} if platform.machine() == "arm64" else set()
    return facts


def usable_cores() -> int:
    """Cores that this process may really use: affinity and the container's quota taken into account."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = quota_cores()
    return max(1, min(affinity, math.ceil(quota))) if quota else affinity


def quota_cores() -> float:
    """The cgroup's CPU quota in cores (v2, then v1); 0 where there is none."""
    for folder in _cgroup_folders("cpu"):
        limit = _read(folder / "cpu.max")
        if limit and not limit.startswith("max"):
            quota, _, period = limit.partition(" ")
            return int(quota) / int(period or 100_000)
        v1 = _read(folder / "cpu.cfs_quota_us")
        if v1 and int(v1) > 0:
            return int(v1) / int(_read(folder / "cpu.cfs_period_us") or 100_000)
    return 0.0


def usable_memory() -> int:
    """Bytes of memory, within the cgroup's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    for folder in _cgroup_folders("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _read(folder / name)
            if limit and limit.isdigit():
                total = min(total, int(limit))
    return int(total)


def _cgroup_folders(controller: str) -> list[Path]:
    root = Path("/sys/fs/cgroup")
    folders = [root, root / controller]
    for line in (_read(Path("/proc/self/cgroup")) or "").splitlines():
        _, names, path = (line.split(":", 2) + ["", ""])[:3]
        if names == "" or controller in names.split(","):
            inner = (root if names == "" else root / controller) / path.lstrip("/")
            # A limit may be set on any folder above; the innermost is looked at first.
            folders = [
                inner,
                *(parent for parent in inner.parents if root in (parent, *parent.parents)),
                *folders,
            ]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # not there, or not ours to read
        return ""


def _caches() -> dict[str, int]:
    """Bytes by level, as the first core sees them."""
    found: dict[str, int] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if _read(index / "type") == "Instruction":
            continue
        size = re.fullmatch(r"(\d+)([KMG]?)", _read(index / "size"))
        if size:
            scale = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[size.group(2)]
            found[f"L{_read(index / 'level')}"] = int(size.group(1)) * scale
    return found


# ---------------------------------------------------------------------------------------------
# What is measured


def _fastest(runs: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Seconds of the fastest run of each, of as many as fit its span.

    They take turns: what else the machine does for a moment hits all of them, and leaves their ratios.
    """
    best, spent = dict.fromkeys(runs, math.inf), dict.fromkeys(runs, 0.0)
    for run in runs.values():
        run()
    for _ in range(50):
        for name, run in runs.items():
            if spent[name] < _SPAN:
                start = time.perf_counter()
                run()
                seconds = time.perf_counter() - start
                spent[name] += seconds
                best[name] = min(best[name], seconds)
    return best


def _bandwidth() -> float:
    import torch

    source = torch.ones(32 << 20, dtype=torch.float32)  # 128 MiB: beyond the usual last-level cache
    target = torch.empty_like(source)
    seconds = _fastest({"copy": lambda: target.copy_(source)})["copy"]
    return 2.0 * source.numel() * source.element_size() / seconds


def _rates() -> dict[str, float]:
    """Operations per second by dtype of a linear layer of 768 to 3072 channels on 128 rows.

    Its weight lies row by row, as in models, and is large beside the rows, as it is for a sentence or two.

    "float32:onednn" and "bfloat16:onednn" have weights packed for oneDNN, which with AMX makes more of a
    difference than the dtype, "float32:mkl" for MKL. "int8" has unsigned rows, packed weights and a result
    in fp32, as `Int8Linear` multiplies.
    """
    import torch

    rows, inner, outer = 128, 768, 3072
    work = 2.0 * rows * inner * outer
    runs: dict[str, Callable[[], Any]] = {}
    generator = torch.Generator().manual_seed(0)
    # A model of the user's may have another default dtype.
    wide = torch.randn(rows, inner, generator=generator, dtype=torch.float32)
    weights = torch.randn(outer, inner, generator=generator, dtype=torch.float32)
    runs["float32"] = lambda: torch.nn.functional.linear(wide, weights)
    if torch.backends.mkldnn.is_available():
        from kpt_plugin_cpu.onednn import pack

        packed = pack(weights)
        runs["float32:onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(
            wide, packed, None, "none", [], ""
        )
    if torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_reorder_linear_weight"):
        packed_by_mkl = torch.ops.mkl._mkl_reorder_linear_weight(weights, rows)
        runs["float32:mkl"] = lambda: torch.ops.mkl._mkl_linear(wide, packed_by_mkl, weights, None, rows)
    half, half_weights = wide.bfloat16(), weights.bfloat16()
    runs["bfloat16"] = lambda: torch.nn.functional.linear(half, half_weights)
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        from kpt_plugin_cpu.onednn import pack

        packed_half = pack(half_weights)
        runs["bfloat16:onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(
            half, packed_half, None, "none", [], ""
        )
    if hasattr(torch.ops.onednn, "qlinear_prepack"):
        from kpt_plugin_cpu import int8_linear

        codes = torch.randint(0, 256, (rows, inner), dtype=torch.uint8, generator=generator)
        zero_points = torch.zeros(outer, dtype=torch.int64)
        product = int8_linear.packed_product
        try:
            codes_of, scale = int8_linear.quantize_weight(weights)  # multiplies, too, to see what saturates
            packed_codes = torch.ops.kpt_cpu.pack_int8(codes_of)
            product(codes, packed_codes, scale, zero_points, torch.float32)
            runs["int8"] = lambda: product(codes, packed_codes, scale, zero_points, torch.float32)
        except RuntimeError:  # oneDNN has no such product for this CPU
            pass
    return {name: work / seconds for name, seconds in _fastest(runs).items()}
