"""Who may read what is written: artifacts as the user's umask has it, the cache nobody else."""

from __future__ import annotations

import os

import pytest
import torch

import kpt
from slow_models import DirectScale, net, plugin


@pytest.mark.parametrize(("umask", "folders", "files"), [(0o022, 0o755, 0o644), (0o027, 0o750, 0o640)])
def test_artifacts_follow_the_umask_and_the_cache_is_private(tmp_path, monkeypatch, umask, folders, files):
    monkeypatch.setenv("KPT_CACHE_DIR", str(tmp_path / "cache"))
    before = os.umask(umask)
    try:
        model = kpt.optimize(net(), torch.randn(32, 16), plugins=[plugin(DirectScale)], budget=20)
        for _ in range(2):  # the second takes the place of the first
            artifact = kpt.save(model, tmp_path / "artifact")
    finally:
        os.umask(before)
    for path in (artifact, *artifact.rglob("*")):
        assert path.stat().st_mode & 0o777 == (folders if path.is_dir() else files), path
    written = [*(tmp_path / "cache").rglob("*")]
    assert any(path.is_file() for path in written)
    for path in (tmp_path / "cache", *written):
        assert path.stat().st_mode & 0o077 == 0, path
