"""`kpt.optimize` never fails, and never returns a wrong model, on whatever transformers has.

The sample is seeded by the commit, so that over time every family is met; `benchmarks/families.py` runs
all of them.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import kpt
from model_families import FAMILIES, sample

pytest.importorskip("transformers")
pytest.importorskip("kpt_plugin_cpu")
_COUNT = 4


def commit_seed() -> str:
    """The commit that is checked out, or a fixed word outside of a repository."""
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "no repository"


def leaves(output: Any) -> list[torch.Tensor]:
    from kpt.judge import outputs

    return [t for t in outputs.tensors(output).values() if t.is_floating_point()]


def relative(mine: torch.Tensor, true: torch.Tensor) -> float:
    return float((mine.double() - true.double()).norm() / true.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize("name", [family.name for family in sample(_COUNT, commit_seed())])
def test_a_sampled_family_stays_right(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KPT_CACHE_DIR", str(tmp_path))
    family = FAMILIES[name]
    model, untouched = family.build(), family.build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert kpt.optimize(model, family.example_inputs(), level="exact", budget=30.0) is model
    receipt = kpt.report(model)
    with torch.no_grad():
        for seed in (11, 12):
            call = family.example_inputs(seed)
            mine, true = leaves(model(**call)), leaves(untouched(**call))
            assert len(mine) == len(true)
            assert all(relative(a, b) < 1e-3 for a, b in zip(mine, true))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if receipt.optimized:
        assert receipt.speedup_low > 1.0 and kpt.report(model).calls["optimized"] == 2
    else:
        assert "forward" not in model.__dict__ and receipt.reason
    kpt.restore(model)
    assert "forward" not in model.__dict__
