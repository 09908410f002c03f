"""What benchmarks/gpu_kernels.py makes of contenders that are wrong; the rest of it needs a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("there is no repository around these tests", allow_module_level=True)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import gpu_kernels

    return gpu_kernels


@pytest.mark.parametrize("wrong", [0.75, float("nan"), float("inf")])
def test_a_wrong_contender_is_refused(wrong: float, benchmark) -> None:
    true = torch.randn(4, 8)
    with pytest.raises(ValueError, match="wrong: a relative error of"):
        benchmark.refuse_wrong(benchmark.error(true * wrong, true))


def test_rounding_and_no_reference_are_not_refused(benchmark) -> None:
    true = torch.randn(4, 8)
    benchmark.refuse_wrong(benchmark.error(true.bfloat16(), true))
    benchmark.refuse_wrong(benchmark.error(true, None))
