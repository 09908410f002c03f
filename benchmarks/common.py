"""What the benchmark scripts share: facts about the machine, result files, comparing outputs."""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import signal
import string
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
for folder in ("examples", "tests"):
    sys.path.insert(0, str(ROOT / folder))

VERSIONS_OF = (
    "kpt-core",
    "kpt-plugin-cpu",
    "kpt-plugin-openvino",
    "torch",
    "transformers",
    "onnxruntime",
    "openvino",
    "torchao",
)

#: What tells two processors of one name apart: a hypervisor often hides the rest of the name.
GENERATION = (("family", "cpu family"), ("model", "model"))


def machine() -> dict[str, Any]:
    """The processor, what of it this process may use, and the memory."""
    facts: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            facts[key.strip()] = value.strip()
    telling = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
    flags = facts.get("flags", "").split()
    name = facts.get("model name", platform.processor() or platform.machine())
    generation = ", ".join(f"{part} {facts[key]}" for part, key in GENERATION if key in facts)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": f"{name} ({generation})" if generation else name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": [flag for flag in telling if flag in flags],
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


@functools.cache
def versions() -> dict[str, str]:
    """Installed versions of what takes part, the Python's, and the commit here; found out once."""
    found = {"python": platform.python_version()}
    for name in VERSIONS_OF:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    try:
        git = ["git", "-C", str(ROOT)]
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", "kpt_core", "plugins"],
            capture_output=True,
            text=True,
            check=True,
        )
        found["commit"] = commit.stdout.strip() + ("+changes" if changed.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        found["commit"] = "unknown"
    return found


def write_result(name: str, content: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Store ``content`` with date, machine and versions as ``name-YYYY-MM-DD.json``.

    What another machine wrote on that day, or this one with other versions of packages, stays: a letter
    follows the date then.
    """
    import torch

    whole = {
        "benchmark": name,
        "schema": 1,
        "date": today(),
        "machine": {**machine(), "threads": torch.get_num_threads()},
        "versions": versions(),
        **content,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = _todays(name, folder)
    path.write_text(json.dumps(rounded(whole), indent=1) + "\n", encoding="utf-8")
    return path


def with_todays(
    name: str,
    part: str,
    records: Mapping[str, Any],
    settings: Mapping[str, Any] | None,
    folder: Path = RESULTS,
    *,
    earlier: Path | None = None,
) -> dict[str, Any]:
    """``records`` and those that today's result file already holds, so that a long run can be done in parts.

    Records of another machine, of other versions of packages or of a run with other ``settings`` are left
    out; None where each record names its settings. Each names the commit it was measured on.

    What an ``earlier`` file holds beyond these is carried on, with its date in each record.

    Raises:
        ValueError: the earlier file is of another machine or of other versions of packages.
    """
    carried: dict[str, Any] = {}
    if earlier is not None:
        old = json.loads(earlier.read_text(encoding="utf-8"))
        if not _like_here(old):
            raise ValueError(f"{earlier} is of another machine or of other versions of packages than here")
        carried = {key: {"date": old["date"], **record} for key, record in old[part].items()}
    path = _todays(name, folder)
    if not path.exists():
        return {**carried, **records}
    before = json.loads(path.read_text(encoding="utf-8"))
    if settings is not None and before["settings"] != rounded(settings):
        return {**carried, **records}
    return {**carried, **before[part], **records}


def _todays(name: str, folder: Path) -> Path:
    """Where today's results of this machine go: into the file that it wrote before, or into a new one."""
    for letter in ("", *string.ascii_lowercase[1:]):  # letters sort behind the name without one
        path = folder / f"{name}-{today()}{letter}.json"
        if not path.exists():
            break
        if _like_here(json.loads(path.read_text(encoding="utf-8"))):
            break
    return path


def _like_here(result: Mapping[str, Any]) -> bool:
    """Whether a result file is of this machine and of the versions of packages that are installed."""
    alike = all(result["machine"].get(key) == value for key, value in rounded(machine()).items())
    return alike and _packages(result["versions"]) == _packages(versions())


def _packages(found: Mapping[str, str]) -> dict[str, str]:
    """The versions of everything but this project, whose commit each record names."""
    return {name: value for name, value in found.items() if name != "commit" and not name.startswith("kpt-")}


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def rounded(value: Any) -> Any:
    """``value`` with every float cut to four significant digits, so that result files can be read."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def tensors(value: Any) -> Iterator[Any]:
    """The floating-point tensors in a model's output, in order; arrays are taken for tensors."""
    import torch

    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
    elif hasattr(value, "__array__"):
        yield from tensors(torch.as_tensor(value))


def first_tensor(value: Any) -> Any:
    """The first floating-point tensor of an output, the one that errors are measured on."""
    for tensor in tensors(value):
        return tensor
    raise TypeError(f"no floating-point tensor in an output of type {type(value).__name__}")


def relative_error(output: Any, reference: Any) -> float:
    """||output - reference|| / ||reference|| of the first tensors; inf if shapes or values are off."""
    return tensor_error(first_tensor(output), first_tensor(reference))


def tensor_error(output: Any, reference: Any) -> float:
    """||output - reference|| / ||reference|| of two tensors in fp64; inf if shapes or values are off."""
    import torch

    mine, true = output.double(), reference.double()
    if mine.shape != true.shape or not torch.isfinite(mine).all():
        return float("inf")
    return float((mine - true).norm() / true.norm().clamp_min(1e-30))


class OutOfTime(Exception):
    """A contender's set-up took longer than it may."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the main thread after ``seconds``."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"set-up took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
