"""Training steps (forward, loss, backward) of every contender on two models, all in one interleaved run.

As `cpu_models.py`: each model in a process of its own, ratios to eager fp32 with a 95 % bootstrap interval,
fresh inputs for every step, and what can't be set up stays in the file with its reason. The error is that of
all gradients together, relative to those of the model in fp64. Dropout is off, so that there is one right
answer. The optimizer's own step is the same for all, and left out.

    python benchmarks/cpu_training.py [--models bert-base vit-small] [--budget 120]
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, OutOfTime, at_most, first_tensor, with_todays, write_result
from cpu_models import in_a_process, raced, show

MODELS = ("bert-base", "vit-small")
WARM_UP_STEPS = 3
JUDGED_STEPS = 2

Step = Callable[[dict[str, Any]], None]
Prepare = Callable[[Any, Any, float], tuple[Callable[..., Any], dict[str, Any]]]


# ---------------------------------------------------------------------------------------------
# In the child: one model


def eager(model: Any, subject: Any, budget: float) -> tuple[Callable[..., Any], dict[str, Any]]:
    return model, {}


def compiled(model: Any, subject: Any, budget: float) -> tuple[Callable[..., Any], dict[str, Any]]:
    import torch

    return torch.compile(model), {}


def autocast(prepare: Prepare) -> Prepare:
    """The same under autocast in bfloat16."""

    def prepared(model: Any, subject: Any, budget: float) -> tuple[Callable[..., Any], dict[str, Any]]:
        import torch

        inner, facts = prepare(model, subject, budget)

        def forward(**call: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return inner(**call)

        return forward, facts

    return prepared


def kpt_at(level: str) -> Prepare:
    def prepare(model: Any, subject: Any, budget: float) -> tuple[Callable[..., Any], dict[str, Any]]:
        import kpt

        examples = [subject.fresh(1_000_000 + n) for n in range(3)]
        kpt.optimize(model, examples, level=level, budget=budget, cache=False)
        receipt = kpt.report(model)
        facts: dict[str, Any] = {
            "accepted": [entry.name for entry in receipt.accepted],
            "claimed": receipt.speedup,
        }
        if not receipt.optimized:
            facts["unoptimised"] = receipt.reason
        return model, facts

    return prepare


ENTRANTS: tuple[tuple[str, str, Prepare], ...] = (
    ("eager", "exact", eager),
    ("kpt exact", "exact", kpt_at("exact")),
    ("kpt production", "production", kpt_at("production")),
    ("torch.compile", "exact", compiled),
    ("autocast", "production", autocast(eager)),
    ("torch.compile+autocast", "production", autocast(compiled)),
)


def step_of(forward: Callable[..., Any], model: Any) -> Step:
    """Forward, distance of the first output from a fixed target, backward; the next step drops gradients."""
    import torch

    dtype = next(model.parameters()).dtype
    targets: dict[Any, Any] = {}

    def step(call: dict[str, Any]) -> None:
        model.zero_grad(set_to_none=True)
        output = first_tensor(forward(**call))
        target = targets.get(output.shape)
        if target is None:
            drawn = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
            target = targets[output.shape] = drawn.to(dtype)
        (output.to(dtype) - target).square().mean().backward()

    return step


def error(mine: Any, exact: Any) -> float:
    """||gradients - exact gradients|| / ||exact gradients|| over all parameters."""
    off = norm = 0.0
    for parameter, reference in zip(mine.parameters(), exact.parameters(), strict=True):
        if reference.grad is not None:
            given = 0.0 if parameter.grad is None else parameter.grad.double()
            off += float((given - reference.grad).square().sum())
            norm += float(reference.grad.square().sum())
    found = math.sqrt(off / norm)
    return found if math.isfinite(found) else math.inf  # of NaN and a number, `max` gives the first


def without_dropout(model: Any) -> Any:
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The whole record of one model."""
    import torch

    import models
    from trained_models import quiet

    quiet()
    torch._dynamo.config.recompile_limit = 64
    subject = models.build(name)
    original = without_dropout(subject.model).train()
    steps: dict[str, Step] = {}
    own: dict[str, Any] = {}
    records: dict[str, dict[str, Any]] = {}
    for contender, level, prepare in ENTRANTS:
        model = copy.deepcopy(original)
        started = time.perf_counter()
        try:
            with at_most(options.setup_limit):
                forward, facts = prepare(model, subject, options.budget)
                step = step_of(forward, model)
                for n in range(WARM_UP_STEPS):
                    step(subject.fresh(2_000_000 + n))
        except (Exception, OutOfTime) as failure:  # noqa: BLE001 - whatever it fails with is its result
            lines = str(failure).strip().splitlines() or [""]
            reason = f"{type(failure).__name__}: {lines[0][:300]}"
            records[contender] = {"level": level, "status": "failed", "reason": reason}
        else:
            seconds = time.perf_counter() - started
            records[contender] = {"level": level, **facts, "status": "ok", "setup_seconds": seconds}
            steps[contender], own[contender] = step, model
        print(f"  {name}: {contender}: {records[contender]['status']}", file=sys.stderr, flush=True)
    exact = copy.deepcopy(original).double()
    for contender in steps:
        records[contender]["relative_error"] = 0.0
    for n in range(JUDGED_STEPS):
        call = subject.fresh(3_000_000 + n)
        wide = {key: value.double() if value.is_floating_point() else value for key, value in call.items()}
        step_of(exact, exact)(wide)
        for contender, step in steps.items():
            step(call)
            worst = max(records[contender]["relative_error"], error(own[contender], exact))
            records[contender]["relative_error"] = worst
    del exact
    return raced(subject, steps, records, options)


# ---------------------------------------------------------------------------------------------
# In the parent: all models


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--budget", type=float, default=120.0, help="seconds of search for kpt (default 120)")
    parser.add_argument("--seconds", type=float, default=30.0, help="seconds of steps per model")
    parser.add_argument(
        "--setup-limit", type=float, default=300.0, help="seconds a contender's set-up may take"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--child", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        options.out.write_text(json.dumps(measure(options.child, options)), encoding="utf-8")
        return
    passed_on = ["--budget", str(options.budget), "--seconds", str(options.seconds)]
    passed_on += ["--setup-limit", str(options.setup_limit)]
    records = {}
    for name in options.models:
        records[name] = in_a_process(name, passed_on, limit=3600, script=__file__)
        show(name, records[name])
    known = with_todays("cpu_training", "models", records, None, options.results)
    ordered = {model: known[model] for model in MODELS if model in known}
    settings = {"budget": options.budget, "seconds": options.seconds}
    path = write_result("cpu_training", {"settings": settings, "models": ordered}, options.results)
    print(f"\n{path}")


if __name__ == "__main__":
    main()
