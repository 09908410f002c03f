"""Saved models: an optimised one, and those whose class a test names."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import kpt
from slow_models import DirectScale, net, plugin


def saved(tmp_path: Path, **options: Any) -> tuple[Path, torch.nn.Module, torch.Tensor]:
    model, x = net(), torch.randn(8, 16)
    kpt.optimize(model, x, plugins=[plugin(DirectScale)], budget=20)
    assert kpt.report(model).optimized
    return kpt.save(model, tmp_path / "artifact", **options), model, x


def load(path: Path, **options: Any) -> torch.nn.Module:
    return kpt.load(path, plugins=[plugin(DirectScale)], **options)


def edit(path: Path, change: Any) -> None:
    data = json.loads((path / "recipe.json").read_text())
    change(data)
    (path / "recipe.json").write_text(json.dumps(data))


def in_module(monkeypatch: pytest.MonkeyPatch, cls: type) -> type:
    """``cls`` as the class ``Odd`` of an imported module, so that an artifact may name it."""
    home = types.ModuleType("kpt_test_artifact_home")
    home.Odd = cls  # type: ignore[attr-defined]
    cls.__module__, cls.__qualname__, cls.__name__ = home.__name__, "Odd", "Odd"
    monkeypatch.setitem(sys.modules, home.__name__, home)
    return cls


class Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)


def unoptimised(model: torch.nn.Module, path: Path) -> Path:
    return kpt.save(kpt.optimize(model.eval(), torch.randn(4, 8), plugins=[], cache=False), path)
