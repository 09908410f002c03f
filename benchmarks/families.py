"""`kpt.optimize` and `torch.compile` on every small model of tests/model_families.py.

A model counts as right if every output is as close to fp64 as the chosen level promises, before and
after; a failure, a wrong answer or a rejected optimisation counts as a ratio of 1.0 in the mean, ours and
torch.compile's alike.

    python benchmarks/families.py [--families llama t5] [--budget 40] [--level production]
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, at_most, rounded, tensor_error, tensors, versions, with_todays, write_result
from model_families import FAMILIES

#: What an output may be off relative to fp64, beyond twice the eager model's own error, by level.
TOLERANCE = {"exact": 1e-5, "production": 5e-2, "aggressive": 0.15}
#: What the logits' mean Kullback-Leibler divergence may be where the error is larger than that.
DIVERGENCE = {"exact": 0.0, "production": 1e-2, "aggressive": 5e-2}
JUDGED_CALLS = 3


def worst_error(run: Any, model: Any, family: Any) -> dict[str, Any]:
    """How far every floating-point tensor of the output is from fp64, at worst over a few fresh calls.

    ``divergence`` is the mean Kullback-Leibler divergence of the logits, where there are any.
    """
    import torch

    reference_model = reference_of(model, family)
    error, divergence, logits = 0.0, 0.0, False
    for n in range(JUDGED_CALLS):
        call = family.example_inputs(1000 + n)
        output = run(call)
        reference = reference_model(**widened(call, next(reference_model.parameters()).dtype))
        mine, true = list(tensors(output)), list(tensors(reference))
        if len(mine) != len(true):
            return {"relative_error": math.inf, "reason": f"{len(mine)} tensors, expected {len(true)}"}
        error = max([error, *(tensor_error(a, b) for a, b in zip(mine, true))])
        if "logits" in reference and math.isfinite(error):
            logits = True
            expected = reference["logits"].double().log_softmax(-1)
            terms = expected.exp() * (expected - output["logits"].double().log_softmax(-1))
            divergence = max(divergence, float(torch.where(expected.exp() > 0, terms, 0).sum(-1).mean()))
    return {"relative_error": error} | ({"divergence": divergence} if logits else {})


def reference_of(model: Any, family: Any) -> Any:
    """The model in fp64, or in fp32 where its code has no fp64 path (grouped matrix products)."""
    wide = copy.deepcopy(model).double()
    try:
        wide(**widened(family.example_inputs(1000), next(wide.parameters()).dtype))
    except RuntimeError:
        return model
    return wide


def widened(call: dict[str, Any], dtype: Any) -> dict[str, Any]:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in call.items()}


def judged(record: dict[str, Any], eager_error: float, level: str) -> bool:
    """Whether the output is close enough to fp64, or, below "exact", its logits say the same."""
    if record["relative_error"] <= TOLERANCE[level] + 2 * eager_error:
        return True
    return record.get("divergence", math.inf) <= DIVERGENCE[level] and math.isfinite(record["relative_error"])


def optimised_by_kpt(model: Any, family: Any, options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    import kpt

    optimised = kpt.optimize(
        model,
        [family.example_inputs(2000 + n) for n in range(3)],
        level=options.level,
        budget=options.budget,
        cache=False,
    )
    receipt = kpt.report(optimised)
    facts = {"accepted": [entry.name for entry in receipt.accepted], "claimed": receipt.speedup}
    if not receipt.optimized:
        facts["unoptimised"] = receipt.reason
    return (lambda call: optimised(**call)), facts


def compiled_by_torch(model: Any, family: Any, options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    import torch

    compiled = torch.compile(model)
    return (lambda call: compiled(**call)), {}


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The record of one family."""
    import torch

    from side_by_side import race, ratio
    from trained_models import quiet

    quiet()
    torch.set_grad_enabled(False)
    family = FAMILIES[name]
    model = family.build()
    runs: dict[str, Any] = {"eager": lambda call: model(**call)}
    eager = worst_error(runs["eager"], model, family)
    record: dict[str, Any] = {
        "kind": family.kind,
        "eager_error": eager["relative_error"],
        "commit": versions()["commit"],
    }
    for contender, prepare in (("kpt", optimised_by_kpt), ("torch.compile", compiled_by_torch)):
        started = time.perf_counter()
        try:
            with at_most(options.setup_limit):
                run, details = prepare(copy.deepcopy(model), family, options)
                for n in range(3):
                    run(family.example_inputs(3000 + n))
            row = {"status": "ok", "setup_seconds": time.perf_counter() - started, **details}
            row |= worst_error(run, model, family)
            level = options.level if contender == "kpt" else "exact"
            row["right"] = judged(row, eager["relative_error"], level)
            runs[contender] = run
        except Exception as error:  # noqa: BLE001 - whatever a contender fails with is its result
            lines = str(error).strip().splitlines() or [""]
            row = {"status": "failed", "reason": f"{type(error).__name__}: {lines[0][:300]}", "right": False}
        record[contender] = row
    samples = race(runs, family.example_inputs, seconds=options.seconds, least_rounds=15)
    for contender, times in samples.items():
        row = record.setdefault(contender, {})
        row["milliseconds"] = sorted(times)[len(times) // 2] * 1e3
        row["ratio"] = vars(ratio(samples["eager"], times))
    return record


def counted(row: dict[str, Any]) -> float:
    """The ratio that enters the mean: 1.0 for a failure, a wrong answer, or an untouched model."""
    unchanged = row.get("accepted") == []
    return row["ratio"]["median"] if row.get("status") == "ok" and row["right"] and not unchanged else 1.0


def summary(records: dict[str, Any]) -> dict[str, Any]:
    """Shares and geometric means over every family, those that failed included."""

    def mean(contender: str) -> float:
        ratios = [counted(record.get(contender, {})) for record in records.values()]
        return math.exp(sum(map(math.log, ratios)) / len(ratios))

    rows = [record.get("kpt", {}) for record in records.values()]
    slower = [
        name
        for name, record in records.items()
        if record.get("kpt", {}).get("accepted") and record["kpt"]["ratio"]["high"] < 0.98
    ]
    return {
        "families": len(records),
        "right": sum(bool(row.get("right")) for row in rows),
        "accepted_change": sum(bool(row.get("accepted")) for row in rows),
        "slower_than_eager": slower,
        "kpt_geometric_mean": mean("kpt"),
        "torch_compile_geometric_mean": mean("torch.compile"),
        "torch_compile_failed": [
            name
            for name, record in records.items()
            if record.get("torch.compile", {}).get("status") != "ok" or not record["torch.compile"]["right"]
        ],
    }


def in_a_process(name: str, arguments: list[str], limit: float) -> dict[str, Any]:
    """`measure` in a new process; a crash is recorded and stops nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        command = [sys.executable, __file__, "--child", name, "--out", str(path), *arguments]
        try:
            done = subprocess.run(command, cwd=ROOT, timeout=limit, stderr=subprocess.PIPE, text=True)
        except subprocess.TimeoutExpired:
            return {"kind": FAMILIES[name].kind, "failed": f"not done within {limit:.0f} s"}
        if not path.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return {"kind": FAMILIES[name].kind, "failed": f"exit code {done.returncode}: {last[:300]}"}
        return json.loads(path.read_text(encoding="utf-8"))


def show(name: str, record: dict[str, Any]) -> None:
    if "failed" in record:
        print(f"{name:20s} {record['failed']}", flush=True)
        return
    cells = []
    for contender in ("kpt", "torch.compile"):
        row = record[contender]
        if row["status"] == "ok":
            verdict = "right" if row["right"] else "WRONG"
            cells.append(
                f"{contender} {row['ratio']['median']:5.2f}× {verdict} {row['setup_seconds']:5.1f} s"
            )
        else:
            cells.append(f"{contender} {row['reason'][:60]}")
    print(f"{name:20s} {' · '.join(cells)} · {'+'.join(record['kpt'].get('accepted', []))}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), metavar="NAME"
    )
    parser.add_argument("--level", choices=list(TOLERANCE), default="production")
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of search for kpt (default 40)")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="seconds of the interleaved run per family"
    )
    parser.add_argument(
        "--setup-limit", type=float, default=180.0, help="seconds a contender's set-up may take"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--child", choices=list(FAMILIES), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        options.out.write_text(json.dumps(measure(options.child, options)), encoding="utf-8")
        return
    passed_on = ["--level", options.level, "--budget", str(options.budget), "--seconds", str(options.seconds)]
    passed_on += ["--setup-limit", str(options.setup_limit)]
    records = {}
    for name in options.families:
        records[name] = in_a_process(name, passed_on, limit=options.setup_limit * 2 + 120)
        show(name, records[name])
    settings = {"level": options.level, "budget": options.budget, "seconds": options.seconds}
    known = records
    for name in ("families_partial", "families"):
        known = with_todays(name, "families", known, settings, options.results)
    ordered = {name: known[name] for name in FAMILIES if name in known}
    content = {"settings": settings, "summary": summary(ordered), "families": ordered}
    print(json.dumps(rounded(content["summary"]), indent=1))
    # Fewer than all would make another mean.
    whole = len(ordered) == len(FAMILIES)
    path = write_result("families" if whole else "families_partial", content, options.results)
    print(path)


if __name__ == "__main__":
    main()
