"""What benchmarks/gpu_kernels.py makes of wrong contenders, and where figures stand; the rest needs a GPU."""

from __future__ import annotations

import re
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


def test_only_generated_pages_have_rates() -> None:
    """Rates are printed from a run's file: one that was typed would stay when the next run differs."""
    root = BENCHMARKS.parent
    typed = [
        f"{page.relative_to(root)}: {line.strip()}"
        for page in (
            *root.glob("docs/*.md"),
            root / "plugins/triton/README.md",
            root / "plugins/rocm/README.md",
        )
        for text in [page.read_text(encoding="utf-8")]
        if not text.startswith("<!-- Written by tools/generate_reference.py")
        for line in text.splitlines()
        if re.search(r"\d\s?(GB/s|TFLOP/s)", line)
    ]
    assert not typed, "\n".join(typed)
