"""The probe: facts without torch, limits of containers, rates."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from kpt.specs import HardwareProfile
from kpt_plugin_cpu import int8_linear, probe


def test_detection_needs_no_torch_and_names_what_can_be_used():
    code = (
        "import sys; from kpt_plugin_cpu.probe import CpuProbe; p = CpuProbe().detect(); "
        "assert 'torch' not in sys.modules; print(p.compute_units)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 1 <= int(done.stdout) <= (os.cpu_count() or 1)


def test_a_quota_cuts_the_cores_and_a_limit_the_memory(tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("1073741824\n")
    monkeypatch.setattr(probe, "_cgroup_folders", lambda controller: [tmp_path])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert probe.quota_cores() == 1.5
    assert probe.usable_cores() == 2
    assert probe.usable_memory() == 1 << 30


def test_an_old_style_quota_and_none_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "_cgroup_folders", lambda controller: [tmp_path])
    assert probe.quota_cores() == 0.0
    (tmp_path / "cpu.cfs_quota_us").write_text("-1\n")
    assert probe.quota_cores() == 0.0
    (tmp_path / "cpu.cfs_quota_us").write_text("50000\n")
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    assert probe.quota_cores() == 0.5
    assert probe.usable_cores() == 1


def test_rates_are_measured(monkeypatch):
    monkeypatch.setattr(probe, "_SPAN", 0.01)
    profile = probe.CpuProbe().detect()
    assert isinstance(profile, HardwareProfile)
    measured = probe.CpuProbe().measure(profile)
    assert measured.bandwidth > 1e8
    assert measured.matmul_rates["float32"] > 1e8
    if platform.machine() == "x86_64":  # signed by signed falls into a reference path: it was 1/60 here
        assert measured.matmul_rates["int8"] > 0.3 * measured.matmul_rates["float32"]
    assert measured.predicted_seconds(0.0, 1e9, "float32") > 0


def test_the_int8_rate_is_that_of_weights_packed_once(monkeypatch):
    """Packing takes as long as the product, or several times that with AMX."""
    prepack, product, seen = torch.ops.onednn.qlinear_prepack, int8_linear.packed_product, []

    def packing(*given):
        seen.append("pack")
        return prepack(*given)

    def multiplying(*given):
        seen.append("product")
        return product(*given)

    monkeypatch.setattr(probe, "_SPAN", 0.01)
    monkeypatch.setattr(torch.ops.onednn, "qlinear_prepack", packing)
    monkeypatch.setattr(int8_linear, "packed_product", multiplying)
    rates = probe.CpuProbe().measure(probe.CpuProbe().detect()).matmul_rates
    if "int8" not in rates:
        pytest.skip("oneDNN has no int8 product for this CPU")
    assert seen.count("pack") <= 2 < seen.count("product"), seen


def test_a_cpu_without_int8_products_has_the_other_rates(monkeypatch):
    def refused(*given):
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(probe, "_SPAN", 0.01)
    monkeypatch.setattr(int8_linear, "packed_product", refused)
    int8_linear.largest_weight.cache_clear()
    rates = probe.CpuProbe().measure(probe.CpuProbe().detect()).matmul_rates
    assert "int8" not in rates and rates["float32"] > 1e8


def test_rates_are_those_of_fp32_whatever_the_default_dtype(monkeypatch):
    monkeypatch.setattr(probe, "_SPAN", 0.01)
    multiplied, product = [], torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda a, b: multiplied.append(a.dtype) or product(a, b)
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        measured = probe.CpuProbe().measure(probe.CpuProbe().detect())
    finally:
        torch.set_default_dtype(before)
    assert measured.matmul_rates["float32"] > 1e8
    assert set(multiplied) == {torch.float32, torch.bfloat16}
