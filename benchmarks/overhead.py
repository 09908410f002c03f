"""What kpt itself costs: starting it, a call through a committed plan, and a second process.

Three parts, each run in fresh processes:

* ``start``: `import kpt` (and whether torch came along), `kpt --help`, `kpt plugins list`.
* ``call``: microseconds that a committed plan adds to a call, by the number of tensors that it watches. The
  plan's forward does what the plain model's does, so that the difference is ours.
* ``second``: seconds until a model is ready in a process that finds a recipe, and in the first one that has
  to search.

    python benchmarks/overhead.py [--parts start call second] [--models encoder bert-base] [--budget 120]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from functools import partial
from pathlib import Path
from typing import Any

from common import RESULTS, rounded, with_todays, write_result

PARTS = ("start", "call", "second")
MODELS = ("encoder", "bert-base")
#: Layers of two parameters each, without and with as many tensors as BERT-base has.
LAYERS = (1, 2, 25, 50, 100)
#: What is aimed at: seconds to start, microseconds a call, the second process's share.
GOALS = {
    "import_seconds": 0.06,
    "help_seconds": 0.3,
    "call_microseconds": 3.0,
    "tensor_microseconds": 0.06,
    "second_share": 0.35,
    "second_seconds": 20.0,
}
_REPEATS = 7

_IMPORT = """
import sys, time
start = time.perf_counter()
import kpt
spent = time.perf_counter() - start
print(spent, "torch" in sys.modules)
"""


def start() -> dict[str, Any]:
    """Seconds, the median of several processes, and whether any of them loaded torch."""
    imports = [_output([sys.executable, "-c", _IMPORT]).split() for _ in range(_REPEATS)]
    listing = (
        "import sys; from kpt.cli.main import main\ntry:\n main(['plugins', 'list'])\nexcept SystemExit: pass"
    )
    loaded = _output([sys.executable, "-c", f"{listing}\nprint(*sorted(sys.modules))"])
    command = str(Path(sys.executable).with_name("kpt"))
    return {
        "import_seconds": statistics.median(float(seconds) for seconds, _ in imports),
        "import_loads_torch": any(torch == "True" for _, torch in imports),
        "bare_python_seconds": _seconds([sys.executable, "-c", "pass"]),
        "help_seconds": _seconds([command, "--help"]),
        "plugins_list_seconds": _seconds([command, "plugins", "list"]),
        "plugins_list_loads_torch": "torch" in loaded.splitlines()[-1].split(),
    }


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _seconds(command: list[str]) -> float:
    spent = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        _output(command)
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)


# ---------------------------------------------------------------------------------------------


def call() -> dict[str, Any]:
    """Microseconds a call, by watched tensors, of a positional and of a keyword argument."""
    import torch

    import kpt
    from kpt.specs import Variant
    from slow_models import plugin

    torch.set_num_threads(1)

    class Plain(torch.nn.Module):
        """Layers that are watched, and a forward that does next to nothing."""

        def __init__(self, layers: int) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(layers)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.neg()

    class Detour(Plain):
        """The same with work that a plan takes out."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(200):
                x = x.neg().neg()
            return x.neg()

    class Straight:
        """The pass that takes it out, and says that it derives copies, so that weights are watched."""

        def propose(self, observation: Any, hardware: Any) -> list[Variant]:
            return [Variant("straight", predicted_gain=50.0, derives=True)]

        def apply(self, model: Any, variant: Variant) -> Any:
            model.forward = Plain.forward.__get__(model)
            return lambda: model.__dict__.pop("forward", None)

        def verify_applied(self, model: Any) -> bool:
            return True

    # Passes are named as "module:attribute" and imported when they are used.
    Straight.__module__, Straight.__qualname__ = "slow_models", "Straight"
    sys.modules["slow_models"].Straight = Straight  # type: ignore[attr-defined]
    x = torch.randn(4, 8)
    found = {}
    for layers in LAYERS:
        plain, model = Plain(layers).eval(), Detour(layers).eval()
        kpt.optimize(model, x, plugins=[plugin(Straight)], cache=False, budget=20.0)
        receipt = kpt.report(model)
        if not receipt.optimized:
            raise SystemExit(f"the plan was not committed: {receipt.reason}")
        with torch.no_grad():
            positional, keyword = (
                _microseconds(partial(model, *args, **kwargs))
                - _microseconds(partial(plain, *args, **kwargs))
                for args, kwargs in (((x,), {}), ((), {"x": x}))
            )
        calls = kpt.report(model).calls
        if calls["fallback"]:
            raise SystemExit(f"calls ran the original forward: {calls['reasons']}")
        found[str(receipt.watched_tensors)] = {
            "modules": sum(1 for _ in model.modules()),
            "positional_microseconds": positional,
            "keyword_microseconds": keyword,
            "allowed_microseconds": GOALS["call_microseconds"]
            + GOALS["tensor_microseconds"] * receipt.watched_tensors,
            "optimized_calls": calls["optimized"],
        }
        kpt.restore(model)
    return found


def _microseconds(run: Any) -> float:
    """Of one call: the fastest of several rounds, since neighbours can only slow a round down."""
    count = 5000
    return min(timeit.repeat(run, number=count, repeat=9)) / count * 1e6


# ---------------------------------------------------------------------------------------------


def second(name: str, budget: float) -> dict[str, Any]:
    """Seconds of `kpt.optimize` in the first process and in the second, which shares its cache."""
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for _ in range(2):
            arguments = ["--child", name, "--budget", str(budget), "--cache", folder]
            runs.append(json.loads(_output([sys.executable, __file__, *arguments]).splitlines()[-1]))
    first, again = runs
    return {
        "first": first,
        "second": again,
        "share": again["ready_seconds"] / first["ready_seconds"],
        "same_plan": first["accepted"] == again["accepted"],
    }


def ready(name: str, budget: float, cache: str) -> dict[str, Any]:
    """One process: how long until the model is ready, and what happened on the way."""
    import os

    os.environ["KPT_CACHE_DIR"] = cache
    import torch

    import kpt
    import models
    from kpt.transaction import events

    subject = models.build(name)
    examples = [subject.fresh(n) for n in range(2)]
    kinds: list[str] = []
    with events.listen(lambda event: kinds.append(event["kind"])):
        began = time.perf_counter()
        kpt.optimize(
            subject.model,
            examples if subject.dynamic_shapes else examples[:1],
            dynamic_shapes=subject.dynamic_shapes,
            budget=budget,
        )
        spent = time.perf_counter() - began
    receipt = kpt.report(subject.model)
    return {
        "ready_seconds": spent,
        "threads": torch.get_num_threads(),
        "searched": receipt.searched,
        "proposed": "propose" in kinds,
        "recipe": receipt.recipe,
        "optimized": receipt.optimized,
        "accepted": [entry.name for entry in receipt.accepted],
        "speedup": receipt.speedup,
        "reason": receipt.reason,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--budget", type=float, default=120.0, help="seconds of search (default 120)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--child", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(ready(options.child, options.budget, options.cache)))
        return
    records: dict[str, Any] = {}
    if "start" in options.parts:
        records["start"] = start()
    if "call" in options.parts:
        records["call"] = call()
    if "second" in options.parts:
        for name in options.models:
            records[f"second:{name}"] = second(name, options.budget)
    settings = {"budget": options.budget, "goals": GOALS}
    parts = with_todays("overhead", "parts", records, settings, options.results)
    print(json.dumps(rounded(records), indent=1))
    print(write_result("overhead", {"settings": settings, "parts": parts}, options.results))


if __name__ == "__main__":
    main()
