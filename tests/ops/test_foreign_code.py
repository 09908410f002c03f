"""What runs while a site is proved and is none of its code: lazy imports, the garbage collector's calls."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest
import torch

from kpt import ops
from kpt.judge.calls import Call
from kpt.ops.recognition import forget_proofs
from kpt.ops.scan import executed
from slow_models import SlowNorm


class Finalized:
    """Garbage that only the collector frees, and that runs code then."""

    def __init__(self) -> None:
        self.me = self

    def __del__(self) -> None:
        self.me = None


@pytest.fixture
def eager_collector() -> Iterator[None]:
    """Garbage in every generation, and a collector that looks for it all the time."""
    thresholds = gc.get_threshold()
    gc.collect()
    garbage = [Finalized() for _ in range(100)]
    gc.set_threshold(1, 1, 1)
    del garbage
    yield
    gc.set_threshold(*thresholds)


def test_what_the_collector_runs_is_not_the_sites() -> None:
    def making_garbage() -> int:
        for _ in range(5000):  # more than the collector lets pass
            Finalized()
        return 1

    def only_using(container: list[object]) -> int:
        for _ in range(5000):
            container.append([])
        return len(container)

    gc.collect()
    for _ in range(200):
        Finalized()
    watch, result = executed(lambda: only_using([]))
    assert result == 5000 and watch.complaint is None
    assert gc.isenabled()
    assert "writes the attribute" in (executed(making_garbage)[0].complaint or "")  # by its own __init__


def test_a_site_is_proved_whatever_else_is_collected_meanwhile(eager_collector: None) -> None:
    called = []

    class Listener:
        def __call__(self, phase: str, info: object) -> None:
            self.phase = phase
            called.append(phase)

    listener = Listener()
    gc.callbacks.append(listener)
    try:
        for _ in range(3):
            forget_proofs()
            found = ops.recognise(SlowNorm(16).eval(), [Call((torch.randn(8, 16),))])
            assert [site.op for site in found.sites] == ["rms_norm"], found.left_alone
    finally:
        gc.callbacks.remove(listener)
    assert called


def test_code_that_an_import_runs_is_not_the_sites(tmp_path, monkeypatch):
    (tmp_path / "kpt_test_lazily_imported.py").write_text(
        "class Thing:\n    def __init__(self):\n        self.written = 1\nthing = Thing()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def importing():
        import kpt_test_lazily_imported  # type: ignore[import-not-found]

        return kpt_test_lazily_imported.thing.written

    watch, result = executed(importing)
    assert result == 1 and watch.complaint is None
    module = sys.modules.pop("kpt_test_lazily_imported")

    def writing():
        import json  # noqa: F401 - an import before the write must not hide it

        return module.Thing()

    assert "writes the attribute 'written'" in executed(writing)[0].complaint
