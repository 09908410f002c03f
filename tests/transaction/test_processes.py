"""Several processes: data parallelism, determinism, and a recipe that another process found."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import mixed_models

JOBS = Path(__file__).resolve().parent.parent / "jobs.py"


class Hung(AssertionError):
    """Jobs did not end; the text is what they wrote, with where they waited."""


def at_once(number: int, name: str, folder: Path, seconds: float = 600.0) -> list[Any]:
    """What ``number`` processes print that do the same job; they are ended, with theirs, after ``seconds``.

    A job may search twice with 120 s each, where others have made the machine slow. Each process compiles by
    itself: helpers of the compiler's would import torch anew for each of them.
    """
    command = [sys.executable, str(JOBS), name, str(folder)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pipes["env"] = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        started = []
        for _ in range(number):
            job = subprocess.Popen(command, start_new_session=True, **pipes)
            started.append(stack.enter_context(job))
            stack.callback(_end, job)
        try:
            printed = [job.communicate(timeout=seconds) for job in started]
        except subprocess.TimeoutExpired:
            for job in started:
                _end(job)
            raise Hung("\n".join(job.communicate()[1][-6000:] for job in started)) from None
        for job, (_, errors) in zip(started, printed, strict=True):
            assert job.returncode == 0, errors[-3000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in printed]


def _end(job: subprocess.Popen[str]) -> None:
    """With the processes that it started, which hold its pipes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)


def run_job(name: str, folder: Path) -> Any:
    """What one process prints that does the job.

    One that did not end is done once more, with a warning that says where it waited: in one of some forty
    runs of the whole suite two ranks did, and never alone.
    """
    try:
        return at_once(1, name, folder, 300.0)[0]
    except Hung as error:
        warnings.warn(f"the job {name!r} did not end within 300 s and is done again:\n{error}", stacklevel=2)
    (again := folder / "again").mkdir()
    return at_once(1, name, again)[0]


HANGS_ONCE = """
import faulthandler, subprocess, sys, time
from pathlib import Path

def waits():
    # A process that holds the pipes.
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    faulthandler.dump_traceback_later(0.2)
    time.sleep(600)

if Path(sys.argv[2]).name != "again":
    waits()
print('"ended"')
"""


def test_a_job_that_hangs_is_ended_says_where_and_is_done_once_more(tmp_path, monkeypatch):
    (tmp_path / "hangs.py").write_text(HANGS_ONCE)
    soon = functools.partial(at_once, seconds=5.0)
    monkeypatch.setitem(run_job.__globals__, "JOBS", tmp_path / "hangs.py")
    monkeypatch.setitem(run_job.__globals__, "at_once", lambda *given: soon(*given[:3]))
    with pytest.warns(UserWarning, match=r"(?s)'any' did not end .*in waits"):
        assert run_job("any", tmp_path) == "ended"


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
def test_two_data_parallel_processes_train_as_without_kpt(tmp_path):
    ranks = run_job("distributed", tmp_path)
    for rank, found in enumerate(ranks):
        optimized, mode, reason, calls, searched = found["receipt"]
        assert optimized and mode == "training", reason
        assert searched is (rank == 0)
        assert calls == {"optimized": 32, "fallback": 0, "reasons": {}, "misses": {}}
        assert found["fast before"]["optimized"] == 32
        assert len(set(found["eager"])) == 32
        assert found["after"] == found["eager"]
        assert found["before"] == found["eager"]
        assert found["disagreement"][0] is False
        assert found["refused"][0] is False and found["refused"][1]
        assert found["bad examples"] == ("raised" if rank else "returned")
        assert found["nothing"] == [False, "no plugin had anything to offer here"]
        assert found["rank 0 raises"][0] is False and found["rank 0 raises"][1]
    assert "another rank" in ranks[0]["refused"][1]
    assert ranks[0]["rank 0 raises"][1] == "the metric of rank 0 fails"
    assert "another rank" in ranks[1]["rank 0 raises"][1]
    assert "another rank" in ranks[0]["disagreement"][1]
    assert ranks[0]["eager"] != ranks[1]["eager"]


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
def test_two_data_parallel_processes_with_a_compiled_a_precision_and_a_kernel_variant(tmp_path):
    ranks = run_job("distributed_mixed", tmp_path)
    for found in ranks:
        for way in ("after", "before"):
            mine = found[way]
            assert set(mine["phases"]) == mixed_models.EVERY_PHASE, mine["why"]
            assert mine["calls"] == {"optimized": 32, "fallback": 0, "reasons": {}, "misses": {}}
            for loss, eager in zip(mine["losses"], found["eager"], strict=True):
                assert float.fromhex(loss) == pytest.approx(float.fromhex(eager), rel=0.05)
        assert len(set(found["after"]["losses"])) == 32
        assert found["after"]["losses"] == found["before"]["losses"] != found["eager"]
    assert ranks[0]["after"]["losses"] != ranks[1]["after"]["losses"]
    assert len({found[way]["weights"] for found in ranks for way in ("after", "before")}) == 1


def test_three_processes_under_deterministic_algorithms_agree_bit_for_bit(tmp_path):
    first, second, third = at_once(3, "deterministic", tmp_path)
    assert first == second == third
    assert first["accepted"] == [["DirectScale:direct"], ["DirectScale:direct"]]


def test_three_processes_agree_bit_for_bit_on_compiled_code_kernels_and_a_recipe(tmp_path):
    first = run_job("deterministic_mixed", tmp_path)
    others = at_once(2, "deterministic_mixed", tmp_path)
    assert first["recipe"] == ["miss", "miss"] and first["searched"] == [True, True]
    for found in others:
        assert found["recipe"] == ["hit", "hit"] and found["searched"] == [False, False]
    for found in (first, *others):
        assert found["phases"] == [sorted(mixed_models.EVERY_PHASE)] * 2
        assert found["calls"] == [1, 32]
        assert found["digest"] == first["digest"]


def test_a_second_process_does_not_search(tmp_path):
    assert run_job("cached", tmp_path) == {"searched": True, "recipe": "miss", "optimized": True}
    assert run_job("cached", tmp_path) == {"searched": False, "recipe": "hit", "optimized": True}
