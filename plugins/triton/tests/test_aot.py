"""Every kernel compiles for every architecture, without spills, within its memory, on its matrix units.

tests/aot_cases/<family>.py has ``calls()``: (name, a function that runs an op on meta tensors), and
``more()`` of the same form, of which a sample is compiled (aot_sample.py). A family whose kernels multiply
matrices lists their names in ``DOTS``, and has ``small(kernel, constants)``: why tiles of few rows are right
(matrix_units.py). ``SPILLS`` has the bytes that calls whose names begin so are known to spill, ``SPILLS_ON``
the same by architecture.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import addresses
import aot_ledger
import aot_sample
import matrix_units
import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels that are interpreted cannot be compiled", allow_module_level=True)

from kpt_plugin_triton import aot, norm_rows, tuning
from kpt_plugin_triton.launch import Launch, recording

HERE = Path(__file__).parent
FAMILIES = sorted(path.stem for path in (HERE / "aot_cases").glob("*.py"))
sys.path.insert(0, str(HERE))
#: Bytes that what is only sampled may spill: forms and dtypes with the block sizes of more common ones.
SAMPLED_SPILLS = 256


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_fit_the_architecture(family: str, target: str) -> None:
    cases = importlib.import_module(f"aot_cases.{family}")
    chosen = aot_sample.sample(cases.more(), f"{family} {target}")
    distinct: dict[Any, tuple[str, Launch]] = {}
    for name, run in (*cases.calls(), *chosen):
        with recording(target) as record:
            run()
        assert record.launches, f"{name} launched nothing"
        for launch in record.launches:
            distinct.setdefault(aot.describe(launch), (name, launch))
    faults: list[str] = []
    known = {**getattr(cases, "SPILLS", {}), **getattr(cases, "SPILLS_ON", {}).get(target, {})}
    sampled = {name for name, _ in chosen}
    for name, launch, used in _compiled(distinct, target):
        spills = max([bound for part, bound in known.items() if name.startswith(part)], default=0)
        if name in sampled:
            spills = max(spills, SAMPLED_SPILLS)
        faults += [f"{name}: {used.name} {fault}" for fault in _faults(launch, used, target, spills)]
        if used.name in getattr(cases, "DOTS", ()):
            reason = cases.small(used.name, _constants(launch))
            wrong = matrix_units.faults(used, launch.num_warps, reason)
            faults += [f"{name}: {used.name}: {fault}" for fault in wrong]
    assert not faults, "\n".join([*faults, f"KPT_AOT_SEED={aot_sample.seed()} repeats this sample"])


_SHORT = "cross_entropy_short", "cross_entropy_gradient", "softmax_forward", "softmax_backward"


@pytest.mark.parametrize(
    ("columns", "kernels"),
    [
        (1000, _SHORT),
        (1004, _SHORT),
        (50264, ("cross_entropy_gradient", "softmax_forward_long", "softmax_backward_long")),
    ],
)
def test_rows_are_read_in_whole_units(columns: int, kernels: tuple[str, ...]) -> None:
    """Triton only takes note of multiples of 16; of 8 elements of 16 bits each is one load of 16 bytes."""
    from kpt_plugin_triton import losses, softmax

    logits = torch.empty(4096, columns, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with recording("sm_90") as record:
        target = torch.empty(4096, dtype=torch.int64, device="meta")
        loss = losses.cross_entropy(logits, target, reduction="none")
        loss.backward(torch.empty_like(loss))
        out = softmax.softmax(logits)
        out.backward(torch.empty_like(out))
    seen = set()
    for launch in record.launches:
        name = launch.function.fn.__name__
        if name in kernels:
            text = aot.compile_for(launch, aot.target_of("sm_90")).asm["ptx"]
            width = "v4.b32" if columns % 8 == 0 else "v2.b32"
            assert re.search(rf"ld\.global\S*\.{re.escape(width)}", text), name
            seen.add(name)
    assert seen == set(kernels)


def _faults(launch: Launch, used: aot.Resources, target: str, spills: int = 0) -> list[str]:
    """What is wrong with what a kernel needs; ``spills`` are the bytes that it may spill."""
    found = []
    limit = aot.TARGETS[target][1]
    if used.spilled > spills:
        found.append(f"spills {used.spilled} ({launch.num_warps} warps)")
    if used.shared > limit:
        found.append(f"needs {used.shared} bytes of {limit}")
    return found


def _constants(launch: Launch) -> dict[str, Any]:
    """A launch's compile-time constants by name."""
    names = [parameter.name for parameter in launch.function.params[len(launch.arguments) :]]
    return dict(zip(names, launch.constants, strict=True))


def _compiled(
    distinct: Mapping[Any, tuple[str, Launch]], target: str
) -> Iterator[tuple[str, Launch, aot.Resources]]:
    """Each launch with what it needs, as it is compiled or was before (aot_ledger.py)."""
    for name, launch, result in aot_ledger.compiled(distinct.values(), target):
        yield name, launch, result.used


def _tables() -> list[str]:
    """The architectures that any installed distribution brings a table for; not the user's own tables."""
    folders = [tuning.PACKAGED, *tuning._contributed()]
    return sorted({path.stem for folder in folders for path in folder.glob("*.json")})


@pytest.mark.parametrize("target", _tables())
def test_tuned_options_fit_the_architecture(target: str) -> None:
    """What the tables choose, at the sizes that it was chosen for: a measured table as a whole, of a computed
    one a sample. A row that was the fastest although it spills says how many bytes, and never spills more.
    """
    rows, spills = list(_rows(target)), dict(_spills(target))
    assert rows, f"the table of {target} names no kernel"
    measured = (tuning.PACKAGED / f"{target}.json").exists()
    chosen = rows if measured else aot_sample.sample(rows, f"table {target}")
    distinct: dict[Any, tuple[str, Launch]] = {}
    for name, run in chosen:
        with recording(target) as record:
            run()
        for launch in record.launches:
            distinct.setdefault(aot.describe(launch), (name, launch))
    faults = [
        f"{name}: {used.name} {fault}"
        for name, launch, used in _compiled(distinct, target)
        for fault in _faults(launch, used, target, spills[name])
    ]
    assert not faults, "\n".join([*faults, f"KPT_AOT_SEED={aot_sample.seed()} repeats this sample"])


def _row_name(work: Any, entry: Mapping[str, Any], number: int) -> str:
    return f"{work.kernel.name} {entry} as workload {number}"


def _spills(target: str) -> Iterator[tuple[str, int]]:
    """The bytes that the rows of a table may spill, by the names of `_rows`."""
    from kpt_plugin_triton import tuner

    for number, work in enumerate(tuner.workloads()):
        for entry in work.kernel.entries(target):
            yield _row_name(work, entry, number), entry.get("spilled", 0)


def _rows(target: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """A call for each row of a table."""
    from kpt_plugin_triton import tuner

    by_width = {dtype.itemsize: dtype for dtype in (torch.int8, torch.bfloat16, torch.float32)}
    for number, work in enumerate(tuner.workloads()):
        for entry in work.kernel.entries(target):
            dtype = by_width[entry["itemsize"]]
            yield (
                _row_name(work, entry, number),
                lambda work=work, entry=entry, dtype=dtype: work.prepare(dtype, *entry["sizes"])(
                    entry["options"]
                )(),
            )


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("family", FAMILIES)
def test_addresses_are_computed_in_64_bits(family: str, target: str) -> None:
    """Beyond 2**31 elements a product of a row and a stride needs them."""
    cases = importlib.import_module(f"aot_cases.{family}")
    distinct: dict[Any, tuple[str, Launch]] = {}
    for name, run in cases.calls():
        with recording(target) as record:
            run()
        for launch in record.launches:
            distinct.setdefault(aot.describe(launch), (name, launch))
    for name, _, result in aot_ledger.compiled(distinct.values(), target):
        wrong = ", ".join(result.narrow)
        assert not wrong, f"{name}: {result.used.name} multiplies {wrong} in 32 bits"


def test_a_product_in_32_bits_is_seen() -> None:
    """The check of addresses itself, on a row's start in 32 bits and in 64."""
    text = """
    %row = tt.get_program_id x : i32
    %{place} = arith.muli {row}, %stride : {width}
    %start = tt.addptr %x, %{place} : !tt.ptr<bf16>, {width}
    """
    assert addresses.narrow(text.format(place="place_0", row="%row", width="i32")) == ["place"]
    assert addresses.narrow(text.format(place="place_0", row="%wide", width="i64")) == []


@pytest.mark.parametrize(
    ("unit", "rows", "instructions", "said"),
    [
        ("wgmma", 128, {"wgmma.mma_async": 4}, []),
        ("wgmma", 128, {"wgmma.mma_async": 3}, ["3 wgmma.mma_async instructions, its products need 4"]),
        ("mma", 128, {"mma.sync": 900}, ["128x64 times 64x64 of bf16 on mma is not on wgmma"]),
        (
            "mma",
            16,
            {"mma.sync": 900},
            ["16x64 times 64x64 of bf16 on mma: fewer than 64 rows, and no reason why"],
        ),
        ("none", 128, {}, ["128x64 times 64x64 of bf16 on none is not on wgmma"]),
        ("wgmma", 128, {}, ["0 wgmma.mma_async instructions, its products need 4"]),
    ],
)
def test_products_off_the_fast_units_are_seen(unit, rows, instructions, said) -> None:
    """The check of matrix units itself, for eight warps on sm_90."""
    product = aot.Product(unit, rows, 64, 64, "bf16")
    used = aot.Resources("k", "sm_90", 0, 0, 0, instructions, (product,))
    assert matrix_units.faults(used, 8, None) == said
    if rows == 16:
        assert matrix_units.faults(used, 8, "a reason") == []


def test_a_kernel_that_spills_is_seen() -> None:
    """The check itself: a whole row of 32768 columns in four warps cannot stay in registers."""
    with recording("sm_90") as record:
        x = torch.empty(64, 32768, dtype=torch.bfloat16, device="meta")
        norm_rows.run_forward(x, None, x[0], None, 1e-6, 0.0, True, True, {"ROWS": 1, "num_warps": 4})
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
            size: norm_rows.forward_options.choose("sm_89", 2, size)["num_warps"]
            for size in (4096, 6000, 16384)
        }
        assert chosen[4096] == chosen[6000] == 2
        assert chosen[16384] == norm_rows.forward_rule(2, 16384)["num_warps"]
        assert norm_rows.forward_options.choose("sm_80", 2, 4096) == norm_rows.forward_rule(2, 4096)
        tuner.write(
            tmp_path / "sm_89.json",
            "sm_89",
            [{**row, "sizes": [64], "options": {"ROWS": 1, "num_warps": 1}}],
        )
        assert len(norm_rows.forward_options.entries("sm_89")) == 2, "rows that were not measured again stay"
    finally:
        monkeypatch.undo()
        tuning.forget()


def test_a_table_of_another_schema_says_how_to_mend_it(tmp_path, monkeypatch) -> None:
    (tmp_path / "sm_70.json").write_text('{"schema": 99, "kernels": {}}', encoding="utf-8")
    monkeypatch.setenv("KPT_TRITON_TUNED", str(tmp_path))
    tuning.forget()
    with pytest.raises(ValueError, match="kpt bench --tune"):
        norm_rows.forward_options.choose("sm_70", 2, 4096)
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
