"""How much memory is free, on a device or in this process's control group."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def free_memory(device_type: str) -> float:
    """Free bytes on the device; on a CPU at most what the control group of this process has left."""
    if device_type != "cpu":
        return float(torch.accelerator.get_memory_info()[0])
    return min(_free_in_system(), _free_in_control_group())


def _free_in_system() -> float:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return float(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: the page count below is all there is
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) * 0.5
    except (AttributeError, OSError, ValueError):  # Windows
        return 4.0 * 2**30


#: Files of the limit, the usage and its split, in version 2 and version 1 of control groups.
_GROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def _free_in_control_group(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> float:
    """Limit less usage of the tightest memory control group above this process; infinite without any.

    Cached file pages that the kernel gives up at once count as free, as they do in ``MemAvailable``.
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return float("inf")
    left = float("inf")
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        kind = "memory" if "memory" in controllers.split(",") else controllers
        if kind not in _GROUP_FILES:
            continue
        limit, usage, reclaimable = _GROUP_FILES[kind]
        top = root / kind
        group = top / path.lstrip("/")
        # In a container the path may be the host's and absent here; the top is then the container's own.
        for folder in (group, *group.parents):
            allowed, used = _number_in(folder / limit), _number_in(folder / usage)
            if allowed is not None and used is not None:
                left = min(left, max(0.0, allowed - used + _entry_in(folder / "memory.stat", reclaimable)))
            if folder == top:
                break
    return left


def _number_in(file: Path) -> float | None:
    """The number that a file holds; None if there is no file, or no limit ("max")."""
    try:
        return float(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _entry_in(file: Path, name: str) -> float:
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0.0)
