"""Settings for every test: no network, no cache of the user's, imports out of the collector's sight."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_CACHE = tempfile.TemporaryDirectory(prefix="kpt-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name
os.environ.pop("KPT_CACHE_DIR", None)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Shells start background jobs with Ctrl-C ignored, and every child would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.path != _begun.get("path"):
        _begun["path"] = item.path
        _set_heap_aside()


#: The file whose tests run.
_begun: dict[str, Path] = {}


def _set_heap_aside() -> None:
    """Take what test files import, and what the last one did, out of the collector's sight.

    Each trial of a search ends with a collection, and each fingerprint of the process begins with one. Over
    half a million objects of all test files it took 0.26 s, more than the rest of a small model's search.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def whole_heap() -> Iterator[None]:
    """Everything is in the collector's sight, as `gc.get_referrers` needs it."""
    gc.unfreeze()
    yield
    _set_heap_aside()


def pytest_unconfigure(config: pytest.Config) -> None:
    _CACHE.cleanup()
