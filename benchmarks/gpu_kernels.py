"""Every kernel of the triton plugin beside everyone else who computes the same thing, on one GPU, in one run.

For each op and size every contender is prepared with inputs of its own, its first result is compared with a
reference in higher precision, and it is timed: the median of event times over several rounds in which the
contenders alternate, with the L2 cache flushed before each call. A contender that cannot run, or is wrong, is
listed with its reason. The result file is written anew after every case; where time is short (--limit), the
cases that matter most come first.

    python benchmarks/gpu_kernels.py [--families norms losses] [--matching REGEX] [--limit SECONDS]

With --share 0/4 a process only prepares its share of the cases: four of them fill the compilers' caches on
disk faster than one, before the run that measures.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import RESULTS, at_most, tensors, versions, with_todays, write_result

FAMILIES = (
    "norms",
    "losses",
    "rope",
    "glu",
    "group_norm",
    "quantise",
    "skinny",
    "attention",
)
ROUNDS = 3
#: Seconds that one contender may take to be prepared, where nothing else is asked for.
PATIENCE = 45.0
#: A contender with a larger relative error computes something else, and its time is nobody's goal.
TOLERANCE = 0.05


def timed(call: Callable[[], Any], seconds: float, graph: bool) -> float:
    """The median time of a call in milliseconds."""
    import torch
    import triton

    if graph:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            return float(
                triton.testing.do_bench_cudagraph(call, rep=int(seconds * 1e3), return_mode="median")
            )
    return float(triton.testing.do_bench(call, warmup=25, rep=int(seconds * 1e3), return_mode="median"))


def error(output: Any, reference: Any) -> float | None:
    """The largest relative error ||output - reference|| / ||reference|| over all tensors."""
    if reference is None:
        return None
    worst = 0.0
    mine, true = list(tensors(output)), list(tensors(reference))
    if len(mine) != len(true):
        raise ValueError(f"returned {len(mine)} tensors, the reference {len(true)}")
    for a, b in zip(mine, true):
        if a.shape != b.shape:
            raise ValueError(f"returned a tensor of shape {tuple(a.shape)}, the reference {tuple(b.shape)}")
        difference = (a.float() - b.float()).norm().double() / b.float().norm().double().clamp_min(1e-30)
        worst = max(worst, float(difference.nan_to_num(nan=float("inf"))))
    return worst


def refuse_wrong(worst: float | None) -> None:
    """Raise ValueError for an error with which a contender computes something else than the reference."""
    if worst is not None and not worst <= TOLERANCE:
        raise ValueError(f"wrong: a relative error of {worst:.2g}")


def peak_memory(call: Callable[[], Any]) -> float:
    """GiB that a call takes at its peak, beyond what was allocated before it."""
    import torch

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def measure(case: Any, seconds: float, patience: float = PATIENCE) -> dict[str, Any]:
    """The record of one case: for every contender its time, rate, error, and memory where that matters."""
    import torch

    from gpu.inputs import fresh

    record: dict[str, Any] = {"op": case.op, "size": case.size, "unit": case.unit, "goal": case.goal}
    if case.note:
        record["note"] = case.note
    torch._dynamo.reset()
    reference = None
    try:
        reference = case.reference() if case.reference is not None else None
    except Exception as failure:  # noqa: BLE001 - out of memory, say: times are still worth having
        record["reference_failed"] = _reason(failure)
    calls: dict[str, Callable[[], Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, prepare in case.contenders.items():
        started = time.perf_counter()
        try:
            with at_most(patience):
                fresh()
                call = prepare()
                worst = error(call(), reference)  # of the first call: it may write over its inputs
                refuse_wrong(worst)
                for _ in range(2):
                    call()
                torch.cuda.synchronize()
            rows[name] = {"setup_seconds": time.perf_counter() - started, "error": worst}
            if case.memory:
                rows[name]["peak_gib"] = peak_memory(call)
            calls[name] = call
        except Exception as failure:  # noqa: BLE001 - whatever a contender fails with is its result
            rows[name] = {"failed": _reason(failure)}
    del reference
    times: dict[str, list[float]] = {name: [] for name in calls}
    measured, yardstick = [], None
    with contextlib.suppress(Exception):  # no memory left for it, say: the case is worth having without
        yardstick = yardstick_of(case)
    for _ in range(ROUNDS):
        if yardstick is not None:
            with contextlib.suppress(Exception):
                measured.append(timed(yardstick[1], seconds / ROUNDS, case.graph))
        for name, call in calls.items():
            try:
                times[name].append(timed(call, seconds / ROUNDS, case.graph))
            except Exception as failure:  # noqa: BLE001 - the same, for instance a capture that is refused
                rows[name]["failed"] = _reason(failure)
    for name, samples in times.items():
        if not samples or "failed" in rows[name]:
            continue
        milliseconds = statistics.median(samples)
        rows[name]["ms"] = milliseconds
        rows[name]["spread"] = (max(samples) - min(samples)) / milliseconds
        if case.unit != "ms":
            rows[name]["rate"] = _rate(case, milliseconds)
    record["contenders"] = rows
    if yardstick is not None and measured:
        record["yardstick"] = {"what": yardstick[0], "ms": statistics.median(measured)}
        if case.unit != "ms":
            record["yardstick"]["rate"] = _rate(case, record["yardstick"]["ms"])
    own = rows.get("kpt", {})
    others = [row["ms"] for name, row in rows.items() if not name.startswith("kpt") and "ms" in row]
    if "ms" in own:
        record["ahead_of_best_peer"] = min(others) / own["ms"] if others else None
        if case.goal is not None:
            reached = own["ms"] <= case.goal if case.unit == "ms" else own["rate"] >= case.goal
            record["goal_reached"] = reached
        if case.ahead is not None:
            peer, factor = case.ahead
            record["ahead_goal"] = f"{factor:g} times as fast as {peer}"
            if "ms" in rows.get(peer, {}):
                record["times_as_fast"] = rows[peer]["ms"] / own["ms"]
                record["ahead_goal_reached"] = record["times_as_fast"] >= factor
    return record


def yardstick_of(case: Any) -> tuple[str, Callable[[], Any]] | None:
    """What every contender of a case does too, and how to call that alone; None where nothing is known.

    Where a case keeps its bytes cold by itself (``graph``), they are not compared with a copy.
    """
    import torch

    if case.yardstick is not None:
        name, prepare = case.yardstick
        return name, prepare()
    if case.unit != "GB/s" or case.graph:
        return None
    source = torch.empty(int(case.amount) // 4, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    return "a copy of as many bytes", lambda: target.copy_(source)


def _rate(case: Any, milliseconds: float) -> float:
    return float(case.amount / (milliseconds * 1e-3) / (1e9 if case.unit == "GB/s" else 1e12))


def _reason(failure: Exception) -> str:
    lines = str(failure).strip().splitlines() or [""]
    return f"{type(failure).__name__}: {lines[0][:200]}"


def ceilings(seconds: float) -> dict[str, float]:
    """Copy bandwidth in GB/s (read + write) and matmul rates in TFLOP/s, measured in this run."""
    found = {"copy_GB/s": copy_rate(seconds)}
    for size in (4096, 8192):
        found[f"bf16_matmul_{size}_TFLOP/s"] = matmul_rate(size, seconds)
    return found


def copy_rate(seconds: float) -> float:
    import torch

    source = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / (timed(lambda: target.copy_(source), seconds, False) * 1e-3) / 1e9


def matmul_rate(size: int, seconds: float) -> float:
    import torch

    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / (timed(lambda: a @ b, seconds, False) * 1e-3) / 1e12


def launch_costs() -> dict[str, float]:
    """Host microseconds of one launch of a small rms_norm, in six ways; nothing waits for the GPU."""
    import torch
    import torch.nn.functional as F
    import triton.language as tl

    from kpt_plugin_triton import norm_rows, norms
    from kpt_plugin_triton.kernels.norms import norm_forward
    from kpt_plugin_triton.native import norms as native

    x = torch.randn(8, 1024, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(1024, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    arguments = (x, None, weight, None, y, None, None, None, 8, 1024, 0, 1e-6, 0.0)
    constants = (1024, 1024, 1, False, False, tl.float32)
    compiled = norm_forward.warmup(*arguments, *constants, grid=(8, 1, 1), num_warps=4)
    stream = torch.cuda.current_stream().cuda_stream
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    ways: dict[str, Callable[[], Any]] = {
        "raw compiled kernel": lambda: run(
            8, 1, 1, stream, function, metadata, None, None, None, *arguments, *constants
        ),
        "kpt launch": lambda: norm_rows._forward((8, 1, 1), arguments, constants, 4),
        "triton jit launch": lambda: norm_forward[(8, 1, 1)](*arguments, *constants, num_warps=4),
        "kpt rms_norm, checks and allocation included": lambda: norms.rms_norm(x, weight),
        "torch rms_norm": lambda: F.rms_norm(x, (1024,), weight, 1e-6),
        "kpt rms_norm through the C++ library": lambda: norms.rms_norm(x, weight),
    }
    found: dict[str, float] = {}
    for name, call in ways.items():
        if "C++" in name:
            if native.wait() != "in use":
                continue
            call()  # the first one is launched from Python
        samples = []
        for _ in range(30):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(100):
                call()
            samples.append((time.perf_counter() - started) / 100 * 1e6)
        found[name] = statistics.median(samples)
    return found


def show(record: dict[str, Any]) -> None:
    cells = []
    for name, row in record["contenders"].items():
        if "ms" not in row:
            cells.append(f"{name} -")
        elif record["unit"] == "ms":
            cells.append(f"{name} {row['ms']:.2f}")
        else:
            cells.append(f"{name} {row['rate']:.0f}")
    own = record["contenders"].get("kpt", {})
    if "failed" in own:
        cells.append("KPT " + own["failed"])
    elif own.get("error") is not None:
        cells.append(f"error {own['error']:.1e}")
    goal = "" if record["goal"] is None else f" goal {record['goal']}"
    if "times_as_fast" in record:
        cells.append(f"{record['times_as_fast']:.2f} of {record['ahead_goal']}")
    what = f"{record['op']:26s} {record['size']:22s} {record['unit']:7s}{goal}"
    print(f"{what} | {' · '.join(cells)}", flush=True)


def chosen(families: list[str], matching: re.Pattern[str]) -> list[Any]:
    """The cases that are asked for, those of low rank first."""
    found = [
        case
        for family in families
        for case in importlib.import_module(f"gpu.{family}").cases()
        if matching.search(f"{case.op} {case.size}")
    ]
    return sorted(found, key=lambda case: case.rank)


def measured(cases: list[Any], seconds: float, until: float, patience: float) -> Iterator[dict[str, Any]]:
    import torch

    while cases:
        case = cases.pop(0)  # which lets go of its inputs
        if time.perf_counter() > until:
            facts = {"op": case.op, "size": case.size, "unit": case.unit, "goal": case.goal}
            yield {**facts, "failed": "no time left"}
            continue
        record = measure(case, seconds, patience)
        show(record)
        yield record
        del case
        gc.collect()
        torch.cuda.empty_cache()


def prepare_only(cases: list[Any], until: float) -> None:
    """Call every contender once, for what that leaves in the compilers' caches on disk."""
    import torch

    while cases and time.perf_counter() < until:
        case = cases.pop(0)
        torch._dynamo.reset()
        for prepare in case.contenders.values():
            with contextlib.suppress(Exception):  # the measurement will meet it again, and records it
                prepare()()
        del case, prepare
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--matching", type=re.compile, default=re.compile(""), help="cases, as 'op size'")
    parser.add_argument("--seconds", type=float, default=0.3, help="of timing for each contender and case")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds after which no case is begun")
    parser.add_argument(
        "--setup-limit", type=float, default=PATIENCE, help="seconds a contender's set-up may take"
    )
    parser.add_argument("--share", help="which of the cases to prepare only, as 0/8")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here; these figures mean nothing on another device")
    until = time.perf_counter() + options.limit
    cases = chosen(options.families, options.matching)
    if options.share:
        number, count = map(int, options.share.split("/"))
        prepare_only(cases[number::count], until)
        return
    import triton

    from kpt_plugin_triton.native import norms as native

    settings = {"seconds": options.seconds, "rounds": ROUNDS}
    content: dict[str, Any] = {
        "device": {
            "name": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        },
        "triton": triton.__version__,
        "ceilings": ceilings(options.seconds),
        "launch_microseconds": launch_costs(),
        "norms_in_cpp": native.wait(),
        "settings": settings,
    }
    print({name: round(value) for name, value in content["ceilings"].items()}, flush=True)
    print({name: round(value, 1) for name, value in content["launch_microseconds"].items()}, flush=True)
    done: dict[str, dict[str, Any]] = {}
    missed: dict[str, dict[str, Any]] = {}
    path: Path | None = None
    for record in measured(cases, options.seconds, until, options.setup_limit):
        # What this case was measured on and how: a result file may be completed case by case.
        record |= {"commit": versions()["commit"], "settings": settings}
        (missed if "failed" in record else done)[f"{record['op']} {record['size']}"] = record
        records = with_todays("gpu_kernels", "cases", done, None, options.results)
        path = write_result("gpu_kernels", {**content, "cases": {**missed, **records}}, options.results)
    print(path)


if __name__ == "__main__":
    main()
