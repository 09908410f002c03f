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


#: What CUDA and HIP read when a process first asks for a device.
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def pytest_configure(config: pytest.Config) -> None:
    if not _only_on_gpus(config):
        os.environ.update(dict.fromkeys(_VISIBLE, ""))


def pytest_report_header(config: pytest.Config) -> str:
    return f"GPUs: {'in sight' if _only_on_gpus(config) else 'hidden; tests that need one run with -m gpu'}"


def _only_on_gpus(config: pytest.Config) -> bool:
    """Whether ``-m`` chooses the tests that need a GPU, and none beside them.

    All others are about CPUs: with a GPU in sight, `nn.DataParallel` and sparse tensors do something else.
    """
    from _pytest.mark.expression import Expression

    if not config.option.markexpr:
        return False
    chosen = Expression.compile(config.option.markexpr)
    return chosen.evaluate(lambda name, **_: name == "gpu") and not chosen.evaluate(lambda name, **_: False)


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
