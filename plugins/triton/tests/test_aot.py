"""Every kernel compiles for every architecture, without spills, within its memory, on its matrix units.

tests/aot_cases/<family>.py has ``calls()``: (name, a function that runs an op on meta tensors). A family
whose kernels multiply matrices lists their names in ``DOTS``.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels that are interpreted cannot be compiled", allow_module_level=True)

from kpt_plugin_triton import aot, norms, tuning
from kpt_plugin_triton.launch import Launch, recording

HERE = Path(__file__).parent
FAMILIES = sorted(path.stem for path in (HERE / "aot_cases").glob("*.py"))
sys.path.insert(0, str(HERE))


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_fit_the_architecture(family: str, target: str) -> None:
    cases = importlib.import_module(f"aot_cases.{family}")
    dots = getattr(cases, "DOTS", ())
    limit = aot.TARGETS[target][1]
    distinct: dict[Any, tuple[str, Launch]] = {}
    faults: list[str] = []
    for name, run in cases.calls():
        with recording(target) as record:
            run()
        assert record.launches, f"{name} launched nothing"
        for launch in record.launches:
            distinct.setdefault(aot.describe(launch), (name, launch))
    for name, launch, used in _compiled(distinct, target):
        if used.spilled:
            faults.append(f"{name}: {used.name} spills {used.spilled} ({launch.num_warps} warps)")
        if used.shared > limit:
            faults.append(f"{name}: {used.name} needs {used.shared} bytes of {limit}")
        if used.name in dots and not used.matrix:
            faults.append(f"{name}: {used.name} uses no matrix instruction")
    assert not faults, "\n".join(faults)


def _compiled(
    distinct: Mapping[Any, tuple[str, Launch]], target: str
) -> Iterator[tuple[str, Launch, aot.Resources]]:
    """Each launch with what it needs; two at a time, as LLVM and the assembler let go of Python's lock."""
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda item: aot.compile_launch(item[1], target), distinct.values())
        yield from ((*item, used) for item, used in zip(distinct.values(), found))


@pytest.mark.parametrize("target", [path.stem for path in sorted(tuning.PACKAGED.glob("*.json"))])
def test_tuned_options_fit_the_architecture(target: str) -> None:
    """Everything that the packaged tables choose, at the sizes that it was chosen for."""
    from kpt_plugin_triton import tuner

    limit = aot.TARGETS[target][1]
    by_width = {dtype.itemsize: dtype for dtype in (torch.int8, torch.bfloat16, torch.float32)}
    distinct: dict[Any, tuple[str, Launch]] = {}
    for work in tuner.workloads():
        for entry in work.kernel.entries(target):
            with recording(target) as record:
                work.prepare(by_width[entry["itemsize"]], *entry["sizes"])(entry["options"])()
            for launch in record.launches:
                distinct.setdefault(aot.describe(launch), (f"{work.kernel.name} {entry}", launch))
    assert distinct, f"the table of {target} names no kernel"
    faults = [
        f"{name}: {used}"
        for name, _, used in _compiled(distinct, target)
        if used.spilled or used.shared > limit
    ]
    assert not faults, "\n".join(faults)


def test_a_kernel_that_spills_is_seen() -> None:
    """The check itself: a whole row of 32768 columns in four warps cannot stay in registers."""
    with recording("sm_90") as record:
        x = torch.empty(64, 32768, dtype=torch.bfloat16, device="meta")
        norms._run_forward(x, None, x[0], None, 1e-6, 0.0, True, True, {"ROWS": 1, "num_warps": 4})
    assert aot.compile_launch(record.launches[0], "sm_90").spilled > 0


def test_options_follow_the_architecture(tmp_path, monkeypatch) -> None:
    """A table of one architecture decides there, within a factor of two in size, and nowhere else."""
    from kpt_plugin_triton import tuner

    monkeypatch.setenv("KPT_TRITON_TUNED", str(tmp_path))
    row = {"kernel": "norm_forward", "itemsize": 2, "sizes": [4096], "ms": 0.1}
    tuner.write(tmp_path / "sm_89.json", "sm_89", [{**row, "options": {"ROWS": 3, "num_warps": 2}}])
    tuning.forget()
    try:
        chosen = {
            size: norms.forward_options.choose("sm_89", 2, size)["num_warps"] for size in (4096, 6000, 16384)
        }
        assert chosen[4096] == chosen[6000] == 2
        assert chosen[16384] == norms._forward_rule(2, 16384)["num_warps"]
        assert norms.forward_options.choose("sm_80", 2, 4096) == norms._forward_rule(2, 4096)
        tuner.write(
            tmp_path / "sm_89.json",
            "sm_89",
            [{**row, "sizes": [64], "options": {"ROWS": 1, "num_warps": 1}}],
        )
        assert len(norms.forward_options.entries("sm_89")) == 2, "rows that were not measured again stay"
    finally:
        monkeypatch.undo()
        tuning.forget()


def test_a_table_of_another_schema_says_how_to_mend_it(tmp_path, monkeypatch) -> None:
    (tmp_path / "sm_70.json").write_text('{"schema": 99, "kernels": {}}', encoding="utf-8")
    monkeypatch.setenv("KPT_TRITON_TUNED", str(tmp_path))
    tuning.forget()
    with pytest.raises(ValueError, match="kpt bench --tune"):
        norms.forward_options.choose("sm_70", 2, 4096)
    monkeypatch.undo()
    tuning.forget()


def test_one_thread_at_a_time_reads_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython before 3.12 raises SystemError where two threads take turns inside `ast.parse`."""
    inside, most = 0, 0

    def reading(*args: Any, **kwargs: Any) -> str:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.01)
        inside -= 1
        return ""

    monkeypatch.setattr(aot.ASTSource, "hash", reading)
    monkeypatch.setattr(aot.ASTSource, "make_ir", reading)
    sources = [aot._Source.__new__(aot._Source) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda source: (source.hash(), source.make_ir()), sources))
    assert most == 1
