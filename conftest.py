"""Settings for every test of the repository: no network, and no cache of the user's is read or written."""

from __future__ import annotations

import os
import signal
import tempfile

import pytest

_CACHE = tempfile.TemporaryDirectory(prefix="kpt-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name
os.environ.pop("KPT_CACHE_DIR", None)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Shells start background jobs with Ctrl-C ignored, and every child would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    _CACHE.cleanup()
