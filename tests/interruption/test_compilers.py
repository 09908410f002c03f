"""Inductor's compilers end with a deadline and leave nothing half written; other processes go on."""

from __future__ import annotations

import concurrent.futures
import functools
import os
import shutil
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import pytest

from kpt import interruption


def test_stop_workers_leaves_other_children_alone():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"]) as child:
        interruption.stop_workers()
        assert child.poll() is None
        child.kill()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="children are found on Linux only")
def test_stop_workers_ends_the_compilers_of_inductor_and_no_build_of_the_users(tmp_path, monkeypatch):
    cache, project = tmp_path / "cache", tmp_path / "project"
    cache.mkdir()
    project.mkdir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    compiler = tmp_path / "g++"  # known by its name, as the kernel tells it
    shutil.copy(shutil.which("sleep"), compiler)
    with (
        subprocess.Popen([compiler, "30"], cwd=project) as theirs,
        subprocess.Popen([compiler, "30"], cwd=cache) as ours,
    ):
        try:
            while {p.name for p in interruption.descendants() if p.pid in (theirs.pid, ours.pid)} != {"g++"}:
                time.sleep(0.01)
            assert interruption.stop_workers(patience=0.05) == 1
            ours.wait(timeout=10)
            assert theirs.poll() is None
        finally:
            theirs.kill()
            ours.kill()


DRIVER = """#!/bin/sh
# g++ -o FILE: writes half of it, and once more before it ends
trap 'sleep 0.3; echo half > "$2"; exit 1' TERM
echo half > "$2"
touch "$2.begun"
while :; do sleep 0.05; done
"""


def test_a_locked_pool_of_inductor_holds_nobody_up(monkeypatch):
    """Its lock may be held by a caller that waits for a thread, until an exception reaches it."""
    executor = concurrent.futures.ThreadPoolExecutor(1)
    compiler = types.SimpleNamespace(pool=functools.cache(lambda: executor))
    compiler.pool()
    module = types.SimpleNamespace(AsyncCompile=compiler, _pool_set=())
    monkeypatch.setitem(sys.modules, "torch._inductor.async_compile", module)
    with executor._shutdown_lock:
        began = time.monotonic()
        interruption.stop_workers()
        assert time.monotonic() - began < 3.0
    assert compiler.pool.cache_info().currsize == 0
    until = time.monotonic() + 5.0
    while not executor._shutdown and time.monotonic() < until:
        time.sleep(0.01)
    assert executor._shutdown


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="children are found on Linux only")
def test_a_compiler_that_is_slow_to_end_leaves_no_half_of_a_library(tmp_path, monkeypatch):
    """Inductor looks only whether the file is there, and would load the half of it for ever."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiler, library = tmp_path / "g++", tmp_path / "library.so"
    compiler.write_text(DRIVER)
    compiler.chmod(0o755)
    with subprocess.Popen([compiler, "-o", library], cwd=tmp_path) as driver:
        try:
            while not Path(f"{library}.begun").exists():
                time.sleep(0.01)
            interruption.stop_workers(patience=0.05)
            assert driver.wait(timeout=10) == 1, "it was told to end, and did by itself"
            assert not library.exists()
        finally:
            driver.kill()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="children are found on Linux only")
def test_what_a_killed_driver_had_started_is_ended_too(tmp_path, monkeypatch):
    """Whoever waits for a driver in the main thread, as inductor does, kills it when the deadline comes."""
    cache, pid = tmp_path / "cache", tmp_path / "pid"
    cache.mkdir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    compiler, driver = tmp_path / "cc1plus", tmp_path / "g++"
    shutil.copy(shutil.which("sleep"), compiler)
    driver.write_text(f"#!/bin/sh\n{compiler} 60 &\necho $! > {pid}.new\nmv {pid}.new {pid}\nwait\n")
    driver.chmod(0o755)
    with pytest.raises(interruption.DeadlinePassed):
        with interruption.deadline(0.5):
            subprocess.run([driver], cwd=cache)
    started = Path(f"/proc/{int(pid.read_text())}")
    until = time.monotonic() + 5.0
    while _runs(started) and time.monotonic() < until:
        time.sleep(0.01)
    assert not _runs(started)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="children are found on Linux only")
def test_names_of_processes_may_be_any_bytes(tmp_path):
    named = tmp_path / "ab\N{CJK UNIFIED IDEOGRAPH-65E5}cdefghijklmnopqrs"
    odd = tmp_path / ("x" * 14 + "\N{CJK UNIFIED IDEOGRAPH-65E5}")  # cut after 15 bytes, in the character
    for name in (named, odd):
        shutil.copy(shutil.which("sleep"), name)
    with subprocess.Popen([odd, "30"]) as child, subprocess.Popen([named, "30"]) as other:
        try:
            assert {child.pid, other.pid} <= {process.pid for process in interruption.descendants()}
        finally:
            child.kill()
            other.kill()


def _runs(process: Path) -> bool:
    """Whether a process is there, and not only as a zombie that nobody asked for."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_an_interrupted_compilation_leaves_inductor_usable(tmp_path):
    """A fresh cache makes g++ run; the deadline comes while it does; a second try succeeds."""
    script = textwrap.dedent(
        """
        import torch, time
        from kpt import interruption
        from kpt.compiling import CompiledForward

        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.LayerNorm(8)).eval()
        x = torch.randn(3, 8)
        with torch.no_grad():
            CompiledForward(torch.nn.Tanh().forward)(x)
            seen = []
            for seconds in (0.3, 0.8, 1.5):
                started = time.monotonic()
                try:
                    with interruption.deadline(seconds):
                        forward = CompiledForward(model.forward)
                        forward(x)
                        while True:
                            time.sleep(0.01)
                except interruption.DeadlinePassed:
                    seen.append(time.monotonic() - started - seconds)
            assert len(seen) == 3 and max(seen) < 5, seen
            forward = CompiledForward(model.forward)
            torch.testing.assert_close(forward(x), model(x))
            assert forward.graphs == 1
            interruption.stop_workers()  # those of the compilation that succeeded
            assert not interruption.descendants(), "of what was ended, zombies included, nothing is left"
        """
    )
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": ":".join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
