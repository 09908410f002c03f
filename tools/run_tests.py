"""Every test that needs no accelerator, two jobs at a time: what ``make test`` runs.

The first job holds the tests with close timings, at ordinary priority; its output is shown as it comes. The
others run beside it at the lowest priority, and at ordinary priority once it has ended: whichever of the two
streams is free takes the next. Their output is shown after it.

    python tools/run_tests.py                # all
    python tools/run_tests.py tests/judge -x # pytest with these arguments, and nothing beside it
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VALUES = "plugins/triton/tests/values"
AHEAD = "plugins/triton/tests/test_aot.py"
KERNELS = ("plugins/triton/tests", "plugins/rocm/tests")
#: Tests without close timings, in two parts of about equal length.
UNTIMED = (
    (
        "tests/plugins/test_testing.py",
        "tests/plugins/test_kernels_judged.py",
        "tests/cli/test_plugins_commands.py",
        "tests/artifact",
        "tests/test_repository.py",
        "tests/test_tutorial.py",
    ),
    (
        "tests/test_families.py",
        "tests/test_compiling.py",
        "tests/test_compiled_modules.py",
        "tests/test_uncut_graphs.py",
        "tests/test_writes_in_parts.py",
        "tests/transaction/test_cycles.py",
        "tests/test_lengths.py",
        "tests/cli/test_end_to_end.py",
    ),
)
#: What is compiled ahead of time, by architecture; the last is all that belongs to none of these.
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx90a", "gfx942", "gfx950")


@dataclass
class Job:
    """One pytest. ``seconds``, ``code``, its exit status, and ``output`` are set when it has ended."""

    name: str
    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    code: int | None = None
    output: bytes = b""

    def __str__(self) -> str:
        result = "passed" if self.code == 0 else f"exit status {self.code}"
        return f"{self.seconds:7.0f} s  {result}  {self.name}"

    def command(self) -> list[str]:
        return [sys.executable, "-m", "pytest", "-m", "not gpu", *self.arguments]


def jobs() -> tuple[Job, deque[Job]]:
    """The first job, and the others in the order in which they are taken."""
    apart = [*KERNELS, *(path for part in UNTIMED for path in part)]
    first = Job("all others", [f"--ignore={path}" for path in apart])
    ahead = {"KPT_AOT_SAMPLE": os.environ.get("KPT_AOT_SAMPLE", "1")}
    others = deque([Job("kernels by the interpreter", ["-q", VALUES], {"TRITON_INTERPRET": "1"})])
    others += [Job(f"without timings, part {n}", ["-q", *part]) for n, part in enumerate(UNTIMED, 1)]
    others.append(Job("kernel plugins", ["-q", *KERNELS, f"--ignore={VALUES}", f"--ignore={AHEAD}"]))
    others += [Job(f"ahead of time, {target}", ["-q", AHEAD, "-k", target], ahead) for target in TARGETS]
    rest = " and ".join(f"not {target}" for target in TARGETS)
    others.append(Job("ahead of time, the rest", ["-q", AHEAD, "-k", rest], ahead))
    return first, others


class Streams:
    """Two streams of jobs. The first one starts with ``first``."""

    def __init__(self, first: Job, others: deque[Job]) -> None:
        self.first, self.waiting = first, others
        self.done: list[Job] = []
        self.running: set[subprocess.Popen[bytes]] = set()
        self.lock = threading.Lock()
        self.stopped = False

    def run(self) -> int:
        """The exit status: 0 where all passed."""
        beside = threading.Thread(target=self._take)
        beside.start()
        try:
            self._run(self.first, shown=True)
            self._take()
            beside.join()
        finally:
            with self.lock:
                self.stopped = True
                for process in self.running:
                    process.terminate()
            beside.join()
        print("", *self.done, sep="\n")
        return int(any(job.code != 0 for job in self.done))

    def _take(self) -> None:
        while True:
            with self.lock:
                if self.stopped or not self.waiting:
                    return
                job = self.waiting.popleft()
            self._run(job, shown=False)

    def _run(self, job: Job, *, shown: bool) -> None:
        started = time.monotonic()
        command = job.command()
        if not shown and self.first.code is None and shutil.which("nice"):
            command = ["nice", "-n", "19", *command]
        with self.lock:
            if self.stopped:
                return
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **job.environment},
                stdout=None if shown else subprocess.PIPE,
                stderr=None if shown else subprocess.STDOUT,
            )
            self.running.add(process)
        output, _ = process.communicate()
        with self.lock:
            self.running.discard(process)
            job.code, job.seconds = process.returncode, time.monotonic() - started
            job.output = output or b""
            self.done.append(job)
            for each in self.done if self.first.code is not None else ():
                if each.output:
                    print(f"\n-- {each.name}\n{each.output.decode(errors='replace')}", flush=True)
                    each.output = b""


def main(arguments: list[str]) -> int:
    signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
    )  # so that no job is left behind
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if arguments:
        return subprocess.run(Job("", arguments).command(), cwd=ROOT, check=False).returncode
    return Streams(*jobs()).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
