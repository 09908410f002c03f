"""Time the options of every kernel on the GPU that is here, and write the table that they read.

Reached by ``kpt bench --tune``. Each family lists `Workload`s: typical sizes of one tuned kernel and how to
call it with given options.
"""

from __future__ import annotations

import importlib
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from kpt_plugin_triton import tuning
from kpt_plugin_triton.aot import compile_ahead
from kpt_plugin_triton.launch import INTERPRETED, Launch, architecture, is_recording, recording, version
from kpt_plugin_triton.tuning import KERNELS, SCHEMA, Options, Tuned

#: The modules that have a ``WORKLOADS`` list.
FAMILIES = (
    "norms",
    "losses",
    "softmax",
    "rope",
    "qk_norm_rope",
    "quantise",
    "group_norm_launches",
    "group_norm_stripes",
    "embedding",
    "attention",
    "glu",
    "activations",
    "skinny",
)


@dataclass(frozen=True)
class Workload:
    """Sizes of one tuned kernel that are worth measuring.

    ``prepare(dtype, *size)`` allocates random inputs and returns a function from options to the call to
    time. What is timed with given options has to use them, whatever tables say, and returns what it computed,
    without tensors that it left unwritten: options that give other values than the first ones are left out.
    ``replayed``: time replays of a CUDA graph, for what mostly runs in one. Its call has to keep the L2 cache
    cold by itself.
    """

    kernel: Tuned
    sizes: tuple[tuple[int, ...], ...]
    prepare: Callable[..., Callable[[Options], Callable[[], Any]]]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    replayed: bool = False


def work_device() -> str:
    """Where workloads allocate: on the GPU, or nowhere while launches are only recorded."""
    return "meta" if is_recording() else "cuda"


def workloads() -> list[Workload]:
    """Every workload of every family."""
    found: list[Workload] = []
    for family in FAMILIES:
        found += importlib.import_module(f"kpt_plugin_triton.{family}").WORKLOADS
    return found


def tune(
    only: tuple[str, ...], seconds: float, folder: str | None, tell: Callable[[str], None]
) -> Mapping[str, Any]:
    """See `kpt.specs.Tuner`."""
    todo = workloads()
    names = sorted({work.kernel.name for work in todo})
    unknown = [name for name in only if name not in names]
    if unknown:
        raise ValueError(f"no kernel is called {', '.join(unknown)}; known are {', '.join(names)}")
    if INTERPRETED or not torch.cuda.is_available():
        raise RuntimeError("kernels are tuned on a GPU, and there is none here")
    rows: list[dict[str, Any]] = []
    arch = architecture(torch.cuda.current_device())
    chosen = [work for work in todo if not only or work.kernel.name in only]
    compile_ahead(_every_launch(chosen, arch), arch)
    tell(f"compiled for {arch}")
    path = Path(folder) / f"{arch}.json" if folder else tuning.user_folder() / f"{arch}.json"
    for work in chosen:
        for dtype in work.dtypes:
            for size in work.sizes:
                found = _tune_one(work, dtype, size, seconds, tell)
                write(path, arch, found)  # at once: a run that is cut off keeps what it measured
                rows += found
                torch.cuda.empty_cache()
    return {"path": str(path), "architecture": arch, "rows": rows}


def _every_launch(works: Iterable[Workload], arch: str) -> list[Launch]:
    count = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    with recording(arch, count) as record:
        for work in works:
            for dtype in work.dtypes:
                for size in work.sizes:
                    with_options = work.prepare(dtype, *size)
                    for options in _options(work.kernel, dtype, size):
                        with_options(options)()
    return record.launches


def _options(kernel: Tuned, dtype: torch.dtype, size: tuple[int, ...]) -> list[dict[str, int]]:
    """The rule's choice first, then everything else that is worth timing."""
    rule = dict(kernel.rule(dtype.itemsize, *size))
    return [rule, *(o for o in kernel.candidates(dtype.itemsize, *size) if o != rule)]


def _tune_one(
    work: Workload, dtype: torch.dtype, size: tuple[int, ...], seconds: float, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    kernel = work.kernel
    options = _options(kernel, dtype, size)
    each = max(seconds / len(options), 0.01)
    with_options = work.prepare(dtype, *size)
    times: list[tuple[float, int]] = []
    expected: list[torch.Tensor] = []
    milliseconds = _milliseconds_replayed if work.replayed else _milliseconds
    for number, chosen in enumerate(options):
        call = with_options(chosen)
        found = milliseconds(call, each)
        if found is None:
            continue
        values = list(_floats(call()))
        if not expected:
            expected = values
        if _agree(values, expected):
            times.append((found, number))
        else:  # a compiler may get one of many options wrong, and it may be the fastest
            tell(f"{kernel.name} {size} {dtype}: {chosen} gives other values than {options[0]}; left out")
    if not times:
        tell(f"{kernel.name} {size} {dtype}: no option runs here")
        return []
    # The fastest few once more, in turn, so that one lucky reading decides nothing.
    finalists = [number for _, number in sorted(times)[:3]]
    again: dict[int, list[float]] = {number: [] for number in finalists}
    for _ in range(3):
        for number in finalists:
            value = milliseconds(with_options(options[number]), each)
            if value is not None:
                again[number].append(value)
    best = min((number for number in finalists if again[number]), key=lambda n: statistics.median(again[n]))
    by_rule = {number: value for value, number in times}.get(0)
    row = {
        "kernel": kernel.name,
        "itemsize": dtype.itemsize,
        "sizes": list(size),
        "options": options[best],
        "ms": statistics.median(again[best]),
        "rule_ms": by_rule,
    }
    tell(f"{kernel.name} {size} {dtype}: {options[best]} {row['ms']:.4f} ms, the rule's {by_rule} ms")
    return [row]


def _floats(value: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors that a call returned."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _floats(item)


def _agree(mine: Sequence[torch.Tensor], true: Sequence[torch.Tensor]) -> bool:
    """Whether two results are the same but for rounding and the order of sums; NaN agrees with nothing."""
    if [x.shape for x in mine] != [x.shape for x in true]:
        return False
    errors = ((a.float() - b.float()).norm() <= 0.02 * b.float().norm() for a, b in zip(mine, true))
    return all(bool(error) for error in errors)


def _milliseconds(call: Callable[[], Any], seconds: float) -> float | None:
    """The median time of a call with a cold L2 cache; None where these options do not run."""
    from triton.testing import do_bench

    def timed() -> float:
        return float(do_bench(call, warmup=5, rep=max(int(seconds * 1e3), 10), return_mode="median"))

    return _if_it_runs(call, timed)


def _milliseconds_replayed(call: Callable[[], Any], seconds: float) -> float | None:
    """The median time of a call in replays of a CUDA graph; None where these options do not run."""
    from triton.testing import do_bench_cudagraph

    def timed() -> float:
        with torch.cuda.stream(torch.cuda.Stream()):
            return float(do_bench_cudagraph(call, rep=max(int(seconds * 1e3), 10), return_mode="median"))

    return _if_it_runs(call, timed)


def _if_it_runs(call: Callable[[], Any], timed: Callable[[], float]) -> float | None:
    try:
        call()
        torch.cuda.synchronize()
        return timed()
    except KeyboardInterrupt:
        raise
    except Exception:  # noqa: BLE001 - out of shared memory, registers or threads: not for this device
        return None


def write(path: Path, arch: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Store what was measured; rows of kernels and sizes that were not measured again stay."""
    kept: dict[str, list[dict[str, Any]]] = {}
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before.get("schema") == SCHEMA:
            kept = before["kernels"]
    for row in rows:
        entry = {
            "itemsize": row["itemsize"],
            "sizes": list(row["sizes"]),
            "options": dict(row["options"]),
            "ms": float(f"{row['ms']:.4g}"),
        }
        held = kept.setdefault(row["kernel"], [])
        held[:] = [
            old for old in held if (old["itemsize"], old["sizes"]) != (entry["itemsize"], entry["sizes"])
        ]
        held.append(entry)
    for held in kept.values():
        held.sort(key=lambda entry: (entry["itemsize"], entry["sizes"]))
    content = {
        "schema": SCHEMA,
        "architecture": arch,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "unknown",
        "triton": version(),
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "kernels": {name: kept[name] for name in sorted(kept)},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    tuning.forget()


def known() -> tuple[str, ...]:
    """The names of kernels that have options."""
    return tuple(sorted(KERNELS))
