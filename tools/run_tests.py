"""Every test that needs no accelerator, two jobs at a time: what ``make test`` runs.

The first job holds the tests with close timings, at ordinary priority; its output is shown as it comes. The
others run beside it at the lowest priority, and at ordinary priority once it has ended: whichever of the two
streams is free takes the next. Their output is shown after it.

    python tools/run_tests.py                # all; options of pytest go to each job
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
#: Tests without close timings, in parts.
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
    (
        "plugins/cpu/tests/test_cpu_attention.py",
        "plugins/cpu/tests/test_cpu_conformance.py",
        "plugins/cpu/tests/test_cpu_multihead.py",
        "plugins/cpu/tests/test_cpu_precision.py",
        "plugins/cpu/tests/test_cpu_shapes.py",
        "plugins/cpu/tests/test_int8_ranges.py",
        "plugins/cpu/tests/test_native_int8.py",
        "plugins/openvino/tests/test_openvino.py",
    ),
)
#: What is compiled ahead of time, by architecture; the last is all that belongs to none of these.
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx90a", "gfx942", "gfx950")
#: Seconds that jobs have to end once they are told to.
_PATIENCE = 20.0


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
        result = {0: "passed", None: "did not run"}.get(self.code, f"exit status {self.code}")
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
        self.all = [first, *others]
        self.done: list[Job] = []
        self.running: set[subprocess.Popen[bytes]] = set()
        self.lock = threading.Lock()
        self.stopped = False

    def run(self, fine: tuple[int, ...] = (0,)) -> int:
        """The exit status: 0 where every job ran and ended with one that is ``fine``."""
        beside = threading.Thread(target=self._take)
        beside.start()
        try:
            self._run(self.first, shown=True)
            self._take()
            beside.join()
        except KeyboardInterrupt:
            self._stop(None)  # the terminal has told them, too
            raise
        except BaseException:
            self._stop(signal.SIGINT)
            raise
        print("", *self.all, sep="\n")
        return int(any(job.code not in fine for job in self.all))

    def _stop(self, told: signal.Signals | None) -> None:
        """End what runs, in some seconds: interrupted tests put away what they started."""
        with self.lock:
            self.stopped = True
            running = list(self.running)
        if told is not None:
            for process in running:
                process.send_signal(told)
        end = time.monotonic() + _PATIENCE
        for process in running:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()

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


def part(arguments: list[str]) -> int:
    """Pytest alone with ``arguments``, some of which are paths; it takes the place of this process."""
    values = [path for path in _paths(arguments) if path.is_relative_to(ROOT / VALUES)]
    others = [path for path in _paths(arguments) if path not in values]
    if values and others:
        raise SystemExit(f"Tests in {VALUES} are interpreted, and others are not: give either, not both.")
    if values:
        os.environ["TRITON_INTERPRET"] = "1"
    elif any((ROOT / VALUES).is_relative_to(path) for path in others):
        print(f"Without those in {VALUES}, which are interpreted: run them by that path.", file=sys.stderr)
    os.environ.setdefault("KPT_AOT_SAMPLE", "1")
    os.chdir(ROOT)
    command = Job("", arguments).command()
    os.execv(command[0], command)


def _paths(arguments: list[str]) -> list[Path]:
    """The arguments that are files or folders, tests in them included."""
    named = [ROOT / each.partition("::")[0] for each in arguments if not each.startswith("-")]
    return [path.resolve() for path in named if path.exists()]


def main(arguments: list[str]) -> int:
    signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
    )  # so that no job is left behind
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if _paths(arguments):
        return part(arguments)
    first, others = jobs()
    for job in (first, *others):
        job.arguments += arguments
    # An option may leave a job without tests, which is exit status 5.
    return Streams(first, others).run((0, 5) if arguments else (0,))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
