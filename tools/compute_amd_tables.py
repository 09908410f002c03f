"""Write the tables of plugins/rocm: options for AMD's architectures that no one has measured yet.

For every size that `kpt bench --tune` would measure: the rule's options, or of those worth timing the nearest
to them, that compile without spills and within the LDS. Compiling takes about ten minutes for all
architectures on two cores.

    python tools/compute_amd_tables.py [--architectures gfx942] [--kernels norm_forward]
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import triton

from kpt_plugin_triton import aot, tuner
from kpt_plugin_triton.launch import recording
from kpt_plugin_triton.tuning import SCHEMA

TABLES = Path(__file__).resolve().parent.parent / "plugins" / "rocm" / "kpt_plugin_rocm" / "tables"
ARCHITECTURES = ("gfx90a", "gfx942", "gfx950")


def distance(options: Mapping[str, int], wanted: Mapping[str, int]) -> float:
    """How many doublings lie between two sets of options."""
    names = options.keys() | wanted.keys()
    return sum(abs(math.log2(max(options.get(n, 1), 1) / max(wanted.get(n, 1), 1))) for n in names)


def fits(work: tuner.Workload, dtype: torch.dtype, size: tuple[int, ...], options: Any, target: str) -> bool:
    with recording(target, 256) as record:
        work.prepare(dtype, *size)(options)()
    limit = aot.TARGETS[target][1]
    try:
        used = [aot.compile_launch(launch, target) for launch in record.launches]
    except Exception as error:  # noqa: BLE001 - whatever the compiler cannot do is no option
        print(f"{work.kernel.name} {size} {options}: {type(error).__name__}")
        return False
    return all(item.spilled == 0 and item.shared <= limit for item in used)


def choice(work: tuner.Workload, dtype: torch.dtype, size: tuple[int, ...], target: str) -> Any:
    """The nearest options that fit, or None."""
    wanted = dict(work.kernel.rule(dtype.itemsize, *size))
    options = [wanted, *work.kernel.candidates(dtype.itemsize, *size)]
    for candidate in sorted(options, key=lambda item: distance(item, wanted)):
        if candidate.get("num_warps", 4) <= 16 and fits(work, dtype, size, candidate, target):
            return candidate
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--kernels", nargs="+", default=None)
    chosen = parser.parse_args()
    for target in chosen.architectures:
        path = TABLES / f"{target}.json"
        kernels = json.loads(path.read_text(encoding="utf-8"))["kernels"] if path.exists() else {}
        for work in tuner.workloads():
            if chosen.kernels is not None and work.kernel.name not in chosen.kernels:
                continue
            rows = []
            for dtype in work.dtypes:
                for size in work.sizes:
                    found = choice(work, dtype, size, target)
                    if found is not None:
                        rows.append({"itemsize": dtype.itemsize, "sizes": list(size), "options": found})
            kernels[work.kernel.name] = rows
            print(f"{target} {work.kernel.name}: {len(rows)} sizes", flush=True)
        content = {
            "schema": SCHEMA,
            "architecture": target,
            "measured": False,
            "triton": triton.__version__,
            "date": datetime.date.today().isoformat(),
            "kernels": {name: kernels[name] for name in sorted(kernels)},
        }
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
