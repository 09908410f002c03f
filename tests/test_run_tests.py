"""``make test`` runs every job, fails where one did not run, and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "tools" / "run_tests.py"


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, whose jobs are Python programs in place of tests."""
    spec = importlib.util.spec_from_file_location("run_tests", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "run_tests", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.Job, "command", lambda self: [sys.executable, "-c", *self.arguments])
    return module


def ending(runner: ModuleType, *codes: int, **options: object) -> int:
    first, *others = [runner.Job(f"job {code}", [f"print('ran {code}'); exit({code})"]) for code in codes]
    return runner.Streams(first, deque(others)).run(**options)  # type: ignore[no-any-return]


def test_one_job_that_fails_is_enough(runner: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    assert ending(runner, 0, 0, 0) == 0
    assert ending(runner, 1, 0) == 1
    assert ending(runner, 0, 0, 7) == 1
    told = capfd.readouterr().out
    assert "ran 7" in told and "exit status 7  job 7" in told
    assert ending(runner, 5, 0, fine=(0, 5)) == 0


def test_a_job_that_could_not_be_started_is_no_success(
    runner: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    start = subprocess.Popen

    def refused(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        if "ran 2" in command[-1]:
            raise BlockingIOError(11, "no process left")
        return start(command, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(runner.subprocess, "Popen", refused)
    monkeypatch.setattr("threading.excepthook", lambda arguments: None)
    assert ending(runner, 0, 2, 0) == 1
    assert "did not run  job 2" in capfd.readouterr().out


def test_what_is_ended_ends_its_jobs_in_order(tmp_path: Path) -> None:
    """An interrupted pytest puts away what its tests started; one that is killed would leave it running."""
    program = (
        "import sys, time, pathlib\n"
        "try:\n"
        "    pathlib.Path(sys.argv[1]).write_text('begun')\n"
        "    time.sleep(60)\n"
        "finally:\n"
        "    pathlib.Path(sys.argv[1]).write_text('ended')\n"
    )
    files = [tmp_path / name for name in ("first", "other")]
    script = (
        "import signal, sys\nfrom collections import deque\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\nimport run_tests\n"
        "signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))\n"
        "run_tests.Job.command = lambda self: [sys.executable, '-c', *self.arguments]\n"
        f"jobs = [run_tests.Job('j', [{program!r}, path]) for path in {list(map(str, files))!r}]\n"
        "sys.exit(run_tests.Streams(jobs[0], deque(jobs[1:])).run())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    try:
        end = time.monotonic() + 60.0
        while not all(file.exists() and file.read_text() == "begun" for file in files):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60.0) == 143
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert [file.read_text() for file in files] == ["ended", "ended"]


def test_a_part_is_run_alone_and_interpreted_where_it_has_to_be(
    runner: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(runner.os, "execv", lambda path, command: ran.append(command))
    monkeypatch.setattr(runner.os, "environ", {})
    monkeypatch.setattr(runner.os, "chdir", lambda path: None)
    monkeypatch.setattr(runner.signal, "signal", lambda *given: None)
    runner.main(["tests/judge", "-x"])
    assert ran[-1][-2:] == ["tests/judge", "-x"] and "TRITON_INTERPRET" not in runner.os.environ
    runner.main(["plugins/triton/tests"])
    assert "which are interpreted" in capsys.readouterr().err
    runner.main([f"{runner.VALUES}/test_norms.py::TestRmsNorm"])
    assert runner.os.environ["TRITON_INTERPRET"] == "1" and len(ran) == 3
    with pytest.raises(SystemExit, match="give either"):
        runner.main([runner.VALUES, "tests/judge"])
    begun: list[object] = []
    monkeypatch.setattr(runner.Streams, "run", lambda self, fine: begun.append((self.all, fine)))
    runner.main(["-x"])
    ((jobs, fine),) = begun  # type: ignore[misc]
    assert fine == (0, 5) and all(job.arguments[-1] == "-x" for job in jobs) and len(jobs) > 8


def test_every_path_of_a_job_is_there(runner: ModuleType) -> None:
    first, others = runner.jobs()
    for job in (first, *others):
        for argument in job.arguments:
            path = argument.partition("=")[2] if argument.startswith("--ignore=") else argument
            assert not path.startswith(("tests", "plugins")) or (runner.ROOT / path).exists(), path
