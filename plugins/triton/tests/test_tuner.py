"""What tuning chooses; timing itself needs a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from kpt_plugin_triton import loss_rows, skinny, tuner, tuning
from kpt_plugin_triton.launch import recording
from kpt_plugin_triton.losses import cross_entropy


@pytest.fixture
def kernel() -> Iterator[tuning.Tuned]:
    made = tuning.Tuned(
        "made_up",
        ("columns",),
        lambda *sizes: {"SPEED": 1},
        lambda *sizes: iter([{"SPEED": 2}, {"SPEED": 4}]),
    )
    yield made
    del tuning.KERNELS["made_up"]


@pytest.mark.parametrize("wrong", [0.5, float("nan"), None])
def test_the_fastest_options_are_not_taken_if_their_values_are_others(
    wrong: float | None, kernel: tuning.Tuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A factor of two, NaN; where all agree, the fastest win."""

    def prepare(dtype: torch.dtype, columns: int):
        def with_options(options):
            def call():
                out = torch.ones(columns, dtype=dtype)
                return out * wrong if options["SPEED"] == 4 and wrong is not None else out, None

            call.speed = options["SPEED"]
            return call

        return with_options

    monkeypatch.setattr(tuner, "_milliseconds", lambda call, seconds: 1.0 / call.speed)
    told: list[str] = []
    work = tuner.Workload(kernel, ((8,),), prepare)
    (row,) = tuner._tune_one(work, torch.float32, (8,), 0.1, told.append)
    assert row["options"] == {"SPEED": 4 if wrong is None else 2}
    assert any("gives other values" in line for line in told) == (wrong is not None)


@pytest.mark.parametrize("replayed", [False, True])
def test_what_runs_in_graphs_is_timed_in_graphs(
    replayed: bool, kernel: tuning.Tuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner, "_milliseconds", lambda call, seconds: 1.0)
    monkeypatch.setattr(tuner, "_milliseconds_replayed", lambda call, seconds: 2.0)
    work = tuner.Workload(
        kernel, ((8,),), lambda dtype, columns: lambda options: lambda: torch.ones(8), replayed=replayed
    )
    (row,) = tuner._tune_one(work, torch.float32, (8,), 0.1, lambda line: None)
    assert row["ms"] == (2.0 if replayed else 1.0)


def test_products_of_few_rows_are_timed_with_cold_weights() -> None:
    """More of them in turn than the largest L2 cache holds, in graphs as generation runs them."""
    for work in skinny.WORKLOADS:
        assert work.replayed
        with recording("sm_90") as record:
            options = dict(work.kernel.rule(2, 1024, 4096))
            work.prepare(torch.bfloat16, 1024, 4096)(options)()
        products = [found for found in record.launches if found.function.fn.__name__ != "skinny_sum"]
        assert len(products) * 1024 * 4096 * 2 >= 300e6


def test_a_run_that_is_cut_off_keeps_what_it_measured(
    kernel: tuning.Tuned, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def tune_one(work, dtype, size, seconds, tell):
        if size == (16,):
            raise KeyboardInterrupt
        return [{"kernel": "made_up", "itemsize": 4, "sizes": list(size), "options": {"SPEED": 2}, "ms": 1.0}]

    work = tuner.Workload(kernel, ((8,), (16,)), prepare=lambda dtype, columns: None, dtypes=(torch.float32,))
    monkeypatch.setattr(tuner, "workloads", lambda: [work])
    monkeypatch.setattr(tuner, "_tune_one", tune_one)
    monkeypatch.setattr(tuner, "_every_launch", lambda works, arch: [])
    monkeypatch.setattr(tuner, "compile_ahead", lambda launches, arch: None)
    monkeypatch.setattr(tuner, "architecture", lambda index: "sm_90")
    monkeypatch.setattr(tuner, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in (("current_device", 0), ("empty_cache", None), ("get_device_name", "a card")):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    with pytest.raises(KeyboardInterrupt):
        tuner.tune((), 0.1, str(tmp_path), lambda line: None)
    table = json.loads((tmp_path / "sm_90.json").read_text(encoding="utf-8"))
    assert [entry["sizes"] for entry in table["kernels"]["made_up"]] == [[8]]


@pytest.mark.parametrize("gradient", [False, True])
def test_a_loss_with_a_gradient_and_one_without_have_options_of_their_own(
    gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read where launches are made: tests of rows that are read twice replace them there."""
    for name, block in (("options_of", 32), ("loss_options", 16)):
        options = {"ROWS": 0, "BLOCK": block, "PROGRAMS": 1, "num_warps": 1}
        monkeypatch.setattr(loss_rows, name, lambda *sizes, options=options: options)
    logits = torch.empty(5, 64, dtype=torch.bfloat16, device="meta", requires_grad=gradient)
    with recording("sm_90") as record:
        cross_entropy(logits, torch.empty(5, dtype=torch.int64, device="meta"))
    (launch,) = [found for found in record.launches if "cross_entropy" in found.function.fn.__name__]
    assert launch.function.fn.__name__ == "cross_entropy_long"
    names = [parameter.name for parameter in launch.function.params[len(launch.arguments) :]]
    constants = dict(zip(names, launch.constants, strict=True))
    assert constants["BLOCK"] == (32 if gradient else 16)
