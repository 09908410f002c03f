"""What a run reads of its surroundings: the memory that is free, and the model as it is by now."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kpt
from kpt.transaction import freememory, memory
from kpt.transaction.freememory import _free_in_control_group
from slow_models import DirectScale, net, plugin


def group(folder: Path, limit: str, usage: str, stat: str = "", version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = (
        ("memory.max", "memory.current")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    for name, value in zip((*names, "memory.stat"), (limit, usage, stat)):
        (folder / name).write_text(value + "\n")


def test_the_tightest_group_above_the_process_limits_what_is_free(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/slice/job\n")
    group(tmp_path / "slice" / "job", "max", "700")
    group(tmp_path / "slice", "1000", "700", "anon 600\ninactive_file 50")
    assert _free_in_control_group(tmp_path, own) == 350
    group(tmp_path / "slice", "1000", "1200")
    assert _free_in_control_group(tmp_path, own) == 0


def test_version_1_groups_and_those_of_a_container(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("9:name=systemd:/\n4:memory:/docker/absent\n1:cpu:/\n0::/\n")
    group(tmp_path / "memory", "1000", "100", version=1)
    assert _free_in_control_group(tmp_path, own) == 900
    assert _free_in_control_group(tmp_path, tmp_path / "absent") == float("inf")


def test_free_memory_is_the_smaller_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freememory, "_free_in_control_group", lambda: 10.0)
    assert freememory.free_memory("cpu") == 10.0


def test_peak_memory_of_a_model_on_the_cpu_is_that_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert 4_000_000 <= memory.peak_bytes(lambda: torch.ones(1000, 1000), "cpu") < 5_000_000


def test_refresh_takes_the_examples_along_with_a_model_that_was_cast() -> None:
    model, x = net(), torch.randn(8, 16)
    kpt.optimize(model, x, plugins=[plugin(DirectScale)], budget=20.0, cache=False)
    kpt.restore(model)
    model.double()
    kpt.refresh(model)
    assert kpt.report(model).optimized, kpt.report(model).reason
    with torch.no_grad():
        assert model(x.double()).dtype == torch.float64
    assert kpt.report(model).calls["optimized"] == 1
