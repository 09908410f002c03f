"""Rows on their way to shared memory while others are worked on, and conversions on the fast units."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from kpt_plugin_triton import aot, norms, skinny, tuning
from kpt_plugin_triton.launch import Launch, recording


def backward(arch: str, columns: int, dtype: torch.dtype = torch.bfloat16) -> Launch:
    x = torch.empty(1000, columns, dtype=dtype, device="meta", requires_grad=True)
    weight = torch.empty(columns, dtype=dtype, device="meta")
    with recording(arch) as record:
        norms.layer_norm(x, weight, weight).backward(torch.empty_like(x))
    (found,) = [launch for launch in record.launches if launch.function.fn.__name__ == "norm_backward"]
    return found


def stages(launch: Launch) -> int:
    names = [parameter.name for parameter in launch.function.params[len(launch.arguments) :]]
    return dict(zip(names, launch.constants))["STAGES"]


@pytest.mark.parametrize(
    "arch, columns, dtype, expected",
    [
        ("sm_80", 4096, torch.bfloat16, 3),
        ("sm_89", 8192, torch.bfloat16, 3),
        ("sm_100", 4096, torch.float32, 3),
        ("sm_89", 8192, torch.float32, 1),  # would take more shared memory than that chip has
        ("gfx942", 4096, torch.bfloat16, 1),
    ],
)
def test_norms_have_rows_under_way_where_the_chip_has_room(
    arch: str, columns: int, dtype: torch.dtype, expected: int
) -> None:
    assert stages(backward(arch, columns, dtype)) == expected


def test_rows_under_way_are_copied_to_shared_memory() -> None:
    """Of x and dy, two rows of 8192 columns each: 64 KiB, within what every NVIDIA chip has."""
    used = aot.compile_launch(backward("sm_89", 8192), "sm_80")
    assert used.spilled == 0
    assert 2 * 2 * 8192 * 2 <= used.shared <= 101_376


def test_a_table_of_before_keeps_what_it_measured(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options without STAGES were the fastest of those that have nothing under way."""
    from kpt_plugin_triton import tuner

    options = {"ROWS": 1, "PROGRAMS": 2, "num_warps": 4}
    row = {"kernel": "layer_norm_backward", "itemsize": 2, "sizes": [4096], "options": options, "ms": 0.1}
    tuner.write(tmp_path / "sm_89.json", "sm_89", [row])
    monkeypatch.setenv("KPT_TRITON_TUNED", str(tmp_path))
    tuning.forget()
    try:
        assert stages(backward("sm_89", 4096)) == 1
    finally:
        monkeypatch.undo()
        tuning.forget()


def test_fp8_weights_become_bf16_two_at_a_time() -> None:
    """One by one takes conversions of a quarter of the rate: 16 rows were at 2549 GB/s for 3218 (H200)."""
    x = torch.empty(16, 4096, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(28672, 4096, dtype=torch.float8_e4m3fn, device="meta")
    with recording("sm_90") as record:
        skinny.linear_fp8(x, weight, torch.empty(28672, device="meta"))
    (launch,) = record.launches
    code = aot.compile_for(launch, aot.target_of("sm_90")).asm["ptx"]
    assert "cvt.rn.bf16x2.f32" in code
    assert "cvt.bf16.f16" not in code
