"""Every contender on six models, each model in a process of its own, all contenders in one interleaved run.

A contender that cannot be set up stays in the result file with its reason. Ratios are against eager fp32
of the same run, with a 95 % bootstrap interval; inputs are fresh for every call; errors are relative to
the model in fp64. For each model and level the result says which permitted peer was best and how far kpt
is ahead of it or behind.

    python benchmarks/cpu_models.py [--models bert-base mlp] [--quick] [--carry EARLIER]
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    ROOT,
    OutOfTime,
    at_most,
    first_tensor,
    relative_error,
    versions,
    with_todays,
    write_result,
)

LEVELS = ("exact", "production", "aggressive")
MODELS = ("bert-base", "resnet50", "vit-small", "encoder", "smollm2", "mlp")
JUDGED_CALLS = 3
#: Calls of different sizes that every contender has run before it is timed (compilers specialise by size).
WARM_UP_CALLS = 40

Run = Callable[[dict[str, Any]], Any]


# ---------------------------------------------------------------------------------------------
# In the child: one model


def prepare_eager(model: Any, subject: Any, options: argparse.Namespace) -> tuple[Run, dict[str, Any]]:
    return (lambda call: model(**call)), {}


def prepare_kpt(level: str) -> Callable[..., tuple[Run, dict[str, Any]]]:
    def prepare(model: Any, subject: Any, options: argparse.Namespace) -> tuple[Run, dict[str, Any]]:
        import kpt
        from kpt.transaction import events

        def told(event: dict[str, Any]) -> None:
            seconds = f"{event['seconds']:.0f} s: " if "seconds" in event else ""
            print(f"    {seconds}{event['text']}", file=sys.stderr, flush=True)

        with events.listen(told):
            optimised = kpt.optimize(
                model,
                [subject.fresh(1_000_000 + n) for n in range(8)],
                level=level,
                dynamic_shapes=subject.dynamic_shapes,
                budget=options.budget,
                cache=False,
            )
        receipt = kpt.report(optimised)
        facts = {"accepted": [entry.name for entry in receipt.accepted], "claimed": receipt.speedup}
        if not receipt.optimized:
            facts["unoptimised"] = receipt.reason
        return (lambda call: optimised(**call)), facts

    return prepare


def prepare_peer(spec: Any) -> Callable[..., tuple[Run, dict[str, Any]]]:
    def prepare(model: Any, subject: Any, options: argparse.Namespace) -> tuple[Run, dict[str, Any]]:
        from kpt.plugins import instantiate

        return instantiate(spec.entry).prepare(model, subject.fresh(1_000_000)), {}

    return prepare


def entrants() -> list[tuple[str, str, tuple[str, ...], Callable[..., tuple[Run, dict[str, Any]]]]]:
    """(name, level, required imports, prepare), eager first, then kpt's levels, then every plugin's peers."""
    from kpt.plugins import registry

    found: list[Any] = [("eager", "exact", (), prepare_eager)]
    found += [(f"kpt {level}", level, (), prepare_kpt(level)) for level in LEVELS]
    for registered in registry().specs("kpt_contenders"):
        spec = registered.spec
        if spec.name != "eager" and not spec.name.startswith("kpt"):
            found.append((spec.name, spec.level, tuple(spec.requires), prepare_peer(spec)))
    return found


def set_up(subject: Any, entrant: Any, options: argparse.Namespace) -> tuple[Run | None, dict[str, Any]]:
    """The contender's callable, or None with the reason why there is none."""
    from importlib.util import find_spec

    name, level, requires, prepare = entrant
    record: dict[str, Any] = {"level": level}
    absent = [package for package in requires if find_spec(package) is None]
    if absent:
        return None, record | {"status": "absent", "reason": f"not installed: {', '.join(absent)}"}
    started = time.perf_counter()
    try:
        with at_most(options.setup_limit):
            run, details = prepare(copy.deepcopy(subject.model), subject, options)
            for n in range(WARM_UP_CALLS if subject.dynamic_shapes else 3):
                run(subject.fresh(2_000_000 + n))
    except (Exception, OutOfTime) as error:  # noqa: BLE001 - whatever a contender fails with is its result
        lines = str(error).strip().splitlines() or [""]
        return None, record | {"status": "failed", "reason": f"{type(error).__name__}: {lines[0][:300]}"}
    return run, record | details | {"status": "ok", "setup_seconds": time.perf_counter() - started}


def errors(runs: dict[str, Run], subject: Any) -> dict[str, float]:
    """The largest error relative to fp64 over a few fresh calls, by contender.

    Positions that the call's own mask leaves out do not count: what stands there is nobody's result.
    """
    import torch

    exact = copy.deepcopy(subject.model).double()
    worst = dict.fromkeys(runs, 0.0)
    for n in range(JUDGED_CALLS):
        call = subject.fresh(3_000_000 + n)
        wide = {
            key: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for key, value in call.items()
        }
        reference = exact(**wide)
        for name, run in runs.items():
            error = relative_error(counted(run(call), call), counted(reference, call))
            worst[name] = max(worst[name], error)
    return worst


def counted(output: Any, call: dict[str, Any]) -> Any:
    """The first tensor of an output, without the positions that ``attention_mask`` [B, S] leaves out."""
    first, mask = first_tensor(output), call.get("attention_mask")
    return first if mask is None or first.shape[:2] != mask.shape else first[mask.bool()]


def standing(samples: dict[str, list[float]], records: dict[str, Any]) -> dict[str, Any]:
    """For each level: kpt against the fastest peer that changes the arithmetic no more than the level allows.

    A peer counts if its error is at most that of kpt at the same level or its own level permits it; the
    figure is the paired ratio peer / kpt, above one where kpt is the faster.
    """
    from side_by_side import ratio

    table = {}
    for position, level in enumerate(LEVELS):
        mine = f"kpt {level}"
        peers = [
            name
            for name in samples
            if not name.startswith("kpt") and records[name]["level"] in LEVELS[: position + 1]
        ]
        if mine not in samples or not peers:
            continue
        best = min(peers, key=lambda name: sorted(samples[name])[len(samples[name]) // 2])
        ahead = ratio(samples[best], samples[mine])
        table[level] = {
            "best_peer": best,
            "kpt_times_faster": vars(ahead),
            "verdict": "ahead" if ahead.low > 1 else "behind" if ahead.high < 1 else "level",
        }
    return table


def raced(
    subject: Any, runs: dict[str, Any], records: dict[str, dict[str, Any]], options: argparse.Namespace
) -> dict[str, Any]:
    """The record of one model: the ``records`` of its contenders, with what a race of ``runs`` gave."""
    from side_by_side import race, ratio

    samples = race(runs, subject.fresh, seconds=options.seconds)
    for contender, times in samples.items():
        records[contender]["milliseconds"] = sorted(times)[len(times) // 2] * 1e3
        records[contender]["ratio"] = vars(ratio(samples["eager"], times))
    return {
        "title": subject.title,
        "rounds": len(samples["eager"]),
        "contenders": records,
        "standing": standing(samples, records),
        # What this model was measured on and how: a result file may be completed model by model.
        "commit": versions()["commit"],
        "settings": {"budget": options.budget, "seconds": options.seconds},
    }


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The whole record of one model."""
    import torch

    import models
    from trained_models import quiet

    quiet()
    torch.set_grad_enabled(False)
    # Several contenders compile copies of one model, whose entries torch counts together: without room for
    # all of them the later ones would silently run eagerly.
    torch._dynamo.config.recompile_limit = 64
    subject = models.build(name)
    runs: dict[str, Run] = {}
    records: dict[str, dict[str, Any]] = {}
    for entrant in entrants():
        if options.contenders and entrant[0] not in {"eager", *options.contenders}:
            continue
        run, record = set_up(subject, entrant, options)
        records[entrant[0]] = record
        if run is not None:
            runs[entrant[0]] = run
        print(
            f"  {name}: {entrant[0]}: {record.get('reason', record['status'])}", file=sys.stderr, flush=True
        )
    for contender, error in errors(runs, subject).items():
        records[contender]["relative_error"] = error
    return raced(subject, runs, records, options)


# ---------------------------------------------------------------------------------------------
# In the parent: all models


def in_a_process(
    name: str, arguments: list[str], limit: float, script: str | Path = __file__
) -> dict[str, Any]:
    """`measure` of ``script`` in a new process: neither memory nor threads of one model reach the next."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        command = [sys.executable, str(script), "--child", name, "--out", str(path), *arguments]
        try:
            code = subprocess.run(command, cwd=ROOT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            return {"title": name, "failed": f"not done within {limit:.0f} s"}
        if not path.exists():
            return {"title": name, "failed": f"the process ended with exit code {code}"}
        return json.loads(path.read_text(encoding="utf-8"))


def show(name: str, record: dict[str, Any]) -> None:
    print(f"\n{record['title']}")
    if "failed" in record:
        print(f"  {record['failed']}")
        return
    for contender, row in record["contenders"].items():
        if row["status"] != "ok":
            print(f"  {contender:34s} {row['status']}: {row['reason']}")
            continue
        interval = row["ratio"]
        print(
            f"  {contender:34s} {interval['median']:6.2f}× ({interval['low']:.2f}–{interval['high']:.2f})"
            f"  {row['milliseconds']:9.3f} ms  error {row['relative_error']:.1e}"
            f"  set-up {row['setup_seconds']:5.1f} s"
        )
    for level, row in record["standing"].items():
        gain = row["kpt_times_faster"]
        print(
            f"  → {level}: {row['verdict']} of {row['best_peer']}, {gain['median']:.2f}× ({gain['low']:.2f}–"
            f"{gain['high']:.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--contenders", nargs="+", default=[], help="only these, next to eager")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds of search for kpt (default 120)")
    parser.add_argument(
        "--seconds", type=float, default=45.0, help="seconds of the interleaved run per model"
    )
    parser.add_argument(
        "--setup-limit", type=float, default=300.0, help="seconds a contender's set-up may take"
    )
    parser.add_argument("--quick", action="store_true", help="a budget of 40 s and runs of 6 s")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument(
        "--carry", type=Path, help="an earlier result file of this machine, whose other models are carried on"
    )
    parser.add_argument("--child", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.budget, options.seconds = 40.0, 6.0
    if options.child:
        options.out.write_text(json.dumps(measure(options.child, options)), encoding="utf-8")
        return
    passed_on = ["--budget", str(options.budget), "--seconds", str(options.seconds)]
    passed_on += ["--setup-limit", str(options.setup_limit)]
    if options.contenders:
        passed_on += ["--contenders", *options.contenders]
    records = {}
    for name in options.models:
        records[name] = in_a_process(name, passed_on, limit=3600)
        show(name, records[name])
    settings = {"budget": options.budget, "seconds": options.seconds}
    # A quick look, or one at a few contenders, must not pass for the real thing.
    name = "cpu_models_partial" if options.quick or options.contenders else "cpu_models"
    known = with_todays(name, "models", records, None, options.results, earlier=options.carry)
    ordered = {model: known[model] for model in MODELS if model in known}
    path = write_result(name, {"settings": settings, "models": ordered}, options.results)
    print(f"\n{path}")


if __name__ == "__main__":
    main()
