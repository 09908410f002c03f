"""Optimise and restore, again and again: nothing is left over, memory included."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch

import fingerprints
import kpt
import mixed_models
from fingerprints import fast_calls, optimized
from mixed_models import EVERY_PHASE, phases


def resident_bytes() -> int:
    """Memory of this process, without what malloc only keeps for later."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cycles(
    model: torch.nn.Module, example: torch.Tensor, number: int, compiled: type, *, cache: bool = True
) -> None:
    """Without the cache every cycle searches; with it all but the first apply the recipe."""
    expected = mixed_models.mixed()(example)
    offered = mixed_models.plugins(compiled)
    for _ in range(number):
        optimized(model, example, plugins=offered, cache=cache, budget=120.0)
        receipt = kpt.report(model)
        assert phases(model) == EVERY_PHASE, (receipt.rejected, receipt.notes)
        assert receipt.searched or cache
        with torch.no_grad():
            torch.testing.assert_close(model(example), expected, rtol=0.05, atol=0.05)
        assert fast_calls(model) == 1
        kpt.restore(model)


def stays_flat(compiled: type, warm_up: int, number: int, *, cache: bool = True) -> None:
    model, example = mixed_models.mixed(), torch.randn(64, 64)
    before = fingerprints.of_model(model)
    cycles(model, example, warm_up, compiled, cache=cache)
    memory = resident_bytes()
    cycles(model, example, number - warm_up, compiled, cache=cache)
    assert resident_bytes() < 1.02 * memory
    assert fingerprints.differences(before, fingerprints.of_model(model)) == []
    assert fingerprints.ours(model) == []


def in_a_process(arguments: str) -> None:
    """`stays_flat` where nothing else has run: no memory and no compiled code of other tests counts."""
    script = f"import mixed_models, test_cycles; test_cycles.stays_flat(mixed_models.{arguments})"
    path = os.pathsep.join([os.path.dirname(__file__), *(part for part in sys.path if part)])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, "TORCHINDUCTOR_COMPILE_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_over_fifty_cycles():
    in_a_process("Compiled, 10, 50")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_over_cycles_with_inductor():
    in_a_process("CompiledByInductor, 10, 30")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_over_cycles_that_search():
    in_a_process("Compiled, 6, 15, cache=False")


def test_a_few_cycles_leave_nothing_behind():
    model, example = mixed_models.mixed(), torch.randn(64, 64)
    before, process = fingerprints.of_model(model), fingerprints.of_process()
    optimized(model, example, plugins=mixed_models.plugins(), cache=True)
    workspace = weakref.ref(kpt.transaction.dispatch.plan_of(model).committed.applied.module)
    kpt.restore(model)
    gc.collect()
    assert workspace() is None
    assert fingerprints.differences(before, fingerprints.of_model(model)) == []
    assert fingerprints.differences(process, fingerprints.of_process()) == []
    assert fingerprints.ours(model) == []


def test_an_optimised_model_dies_with_its_plan():
    model = optimized(mixed_models.mixed(), torch.randn(64, 64), plugins=mixed_models.plugins())
    plan = weakref.ref(kpt.transaction.dispatch.plan_of(model))
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None and plan() is None
