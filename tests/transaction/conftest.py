"""One thread, and a cache of its own for every test."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bold_passes
import cached_recipes
from kpt.transaction import events


@pytest.fixture(autouse=True)
def settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("KPT_CACHE_DIR", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def primed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the recipe of `cached_recipes.run` in it, to be copied."""
    folder = tmp_path_factory.mktemp("primed") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KPT_CACHE_DIR", str(folder))
        torch.set_num_threads(1)
        cached_recipes.run()
    return folder


@pytest.fixture
def cached(primed: Path) -> Path:
    """The recipe in this test's own cache."""
    shutil.copytree(primed, os.environ["KPT_CACHE_DIR"])
    (path,) = cached_recipes.recipes()
    return path


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=bold_passes.ERRORS)
def wobbly(request: pytest.FixtureRequest) -> Iterator[str]:
    """The rule by which policies that are right until the transaction commits are refused then."""

    def turn(event: dict[str, Any]) -> None:
        if event["kind"] == "commit":
            bold_passes.BoldUntilTheCommit.error = bold_passes.ERRORS[request.param]

    with events.listen(turn):
        yield request.param
    bold_passes.BoldUntilTheCommit.error = 0.0
