"""One thread and a cache of its own for every test; copies of one artifact to be loaded or damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import artifacts


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KPT_CACHE_DIR", str(tmp_path / "cache"))
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of a model that was optimised once for all."""
    folder = tmp_path_factory.mktemp("original")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KPT_CACHE_DIR", str(folder / "cache"))
        torch.set_num_threads(1)
        return artifacts.saved(folder)[0]


@pytest.fixture
def artifact(original: Path, tmp_path: Path) -> Path:
    """A copy of the original, to be loaded or damaged."""
    return Path(shutil.copytree(original, tmp_path / "artifact"))
