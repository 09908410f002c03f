"""What every command shares: help, errors, exit codes, and what goes to which stream."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys

import pytest

import kpt
from kpt.cli import main as program
from kpt.cli.output import CommandError, Output


def shell(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    script = "import sys; from kpt.cli.main import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False, **options
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], ["-h"], ["plugins", "--help"], ["optimize", "--help"], [], ["plugins"]]
)
def test_help_is_a_result(kpt_cli, arguments):
    answer = kpt_cli(*arguments)
    assert answer.code == 0 and answer.out.startswith("Usage: kpt") and not answer.err


def test_every_command_is_in_the_help_with_its_line(kpt_cli):
    text = " ".join(kpt_cli("--help").out.split()) + " ".join(kpt_cli("plugins", "--help").out.split())
    for key, (_, line) in program.COMMANDS.items():
        assert key.split()[-1] in text and line in text


def test_the_version_is_printed(kpt_cli):
    assert kpt_cli("--version").out == f"kpt {kpt.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plugins", "list"], ["plugins", "show", "nothing"], ["--version"]]
)
def test_light_commands_import_nothing_heavy(arguments):
    script = (
        "import sys; from kpt.cli.main import run; run(sys.argv[1:]);"
        "heavy = {'torch', 'numpy', 'transformers', 'onnxruntime', 'openvino', 'boto3', 'mlflow'};"
        "sys.stderr.write('heavy: ' + repr(sorted(heavy & set(sys.modules))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False
    )
    assert done.stderr.endswith("heavy: []")


def test_help_imports_no_other_command():
    script = (
        "import sys; from kpt.cli.main import run; run(['--help']);"
        "sys.stderr.write(repr([name for name in sys.modules if name.startswith('kpt.cli.')]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr == "['kpt.cli.output', 'kpt.cli.main']"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command"),
        (["plugins", "nonsense"], "No such command"),
        (["plugins", "show"], "Missing argument"),
        (["optimize"], "--model"),
        (["plugins", "list", "--nonsense"], "No such option"),
        (["bench", "--model", "x.pt", "--budget", "soon"], "budget"),
    ],
)
def test_wrong_usage_is_an_error_of_its_own_code(kpt_cli, arguments, message):
    answer = kpt_cli(*arguments)
    assert answer.code == 2 and message in answer.err and not answer.out
    answer = kpt_cli(*arguments, "--json")
    assert answer.code == 2 and not answer.err
    assert answer.json["code"] == "usage" and answer.json["hint"]


@pytest.mark.parametrize(
    ("raised", "code", "exit_code"),
    [
        (CommandError("credentials", "no token", "log in", 4), "credentials", 4),
        (CommandError("quota", "no capacity", "wait", 5), "quota", 5),
        (RuntimeError("boom"), "failed", 1),
        (MemoryError(), "failed", 1),
        (KeyboardInterrupt(), "interrupted", 130),
    ],
)
def test_whatever_a_command_raises_becomes_one_object_and_a_code(
    kpt_cli, monkeypatch, raised, code, exit_code
):
    def command() -> None:
        print("some noise")
        raise raised

    monkeypatch.setattr(program, "_call", lambda arguments, output: command())
    answer = kpt_cli("doctor", "--json")
    assert answer.code == exit_code
    assert set(answer.json) == {"code", "message", "hint"} and answer.json["code"] == code
    assert answer.err == "some noise\n"
    answer = kpt_cli("doctor")
    assert not answer.out and answer.err.startswith("some noise\nerror: ")


def test_what_libraries_print_goes_to_stderr_even_below_python():
    script = (
        "import os, sys\nfrom kpt.cli import main as program\n"
        "def call(arguments, output):\n"
        "    print('from python')\n    os.write(1, b'from C\\n')\n    os.system('echo from a child')\n"
        "    output.result({'answer': float('nan')})\n    return 0\n"
        "program._call = call\nsys.exit(program.run(['doctor', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert json.loads(done.stdout) == {"answer": None}
    assert sorted(done.stderr.split("\n")) == ["", "from C", "from a child", "from python"]


@pytest.mark.parametrize("arguments", ["plugins list", "doctor"])
def test_no_file_is_left_open(arguments):
    script = "import sys; from kpt.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-W", "always::ResourceWarning", "-c", script, *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout and "ResourceWarning" not in done.stderr


def test_a_reader_that_stops_reading_is_no_error():
    script = "import sys; from kpt.cli.main import main; sys.exit(main())"
    command = f"{sys.executable} -c '{script}' doctor --json | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "redirection", "code", "says"),
    [
        ("plugins list", ">&-", 0, ""),
        ("plugins list --json", ">&- 2>&-", 0, ""),
        ("--help", ">&-", 0, ""),
        ("plugins list", ">/dev/full", 1, "No space left"),
        ("plugins list --json", ">/dev/full", 1, "No space left"),
        ("--help", ">/dev/full", 1, "No space left"),
        ("plugins list --no-such-option", "2>&-", 2, ""),
    ],
)
def test_a_stream_that_is_closed_or_full_is_no_traceback(arguments, redirection, code, says):
    script = "import sys; from kpt.cli.main import main; sys.exit(main())"
    command = f"{sys.executable} -c '{script}' {arguments} {redirection}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == code and says in done.stderr
    assert "Traceback" not in done.stderr and "ignored" not in done.stderr


def test_a_narrow_terminal_cuts_no_name_off(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "20")
    assert Output(stdout=Terminal()).console().width == 80
    monkeypatch.setenv("COLUMNS", "100")
    assert Output(stdout=Terminal()).console().width == 100


@pytest.mark.parametrize(("encoding", "mark"), [("ascii", "+"), ("latin-1", "+"), ("utf-8", "✓")])
def test_marks_are_in_the_letters_of_the_terminal(encoding, mark):
    output = Output(stdout=io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert output.mark("✓", "+") == mark


def test_the_programs_lead_to_main(monkeypatch, kpt_cli, capsys):
    called: list[list[str]] = []
    monkeypatch.setattr(program, "run", lambda arguments: called.append(arguments) or 0)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/kpt-optimize", "--model", "x.pt"])
    assert program.main() == program.optimize_main() == 0
    monkeypatch.setattr(sys, "argv", ["/usr/bin/kernelpytorch", "doctor"])
    assert program.main() == 0
    assert called == [["optimize", "--model", "x.pt"]] * 2 + [["doctor"]]


def test_the_whole_application_has_every_command():
    import typer

    root = typer.main.get_command(program.app)
    found = set(root.commands) - {"plugins"} | {
        f"plugins {name}" for name in root.commands["plugins"].commands
    }
    assert found == set(program.COMMANDS)


def test_an_error_has_a_hint_on_its_own_line(capsys):
    Output().error(CommandError("x", "It is wrong.", "Do this."))
    assert capsys.readouterr().err == "error: It is wrong.\n  Do this.\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupting_a_command_ends_it_with_its_own_code(number, tmp_path):
    (tmp_path / "kpt_test_slow_factory.py").write_text(
        "import sys, time\ndef make():\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    import torch

    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "model.pt")
    # A signal that the caller of these tests ignores, as nohup does, would stay ignored.
    heard = "default_int_handler" if number == signal.SIGINT else "SIG_DFL"
    script = f"import signal, sys; signal.signal({int(number)}, signal.{heard})\n"
    script += "from kpt.cli.main import main; sys.exit(main())"
    options = [
        "--model",
        "model.pt",
        "--arch",
        "kpt_test_slow_factory:make",
        "--inputs",
        "float32[1,2]",
        "--json",
    ]
    running = subprocess.Popen(
        [sys.executable, "-c", script, "optimize", *options],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stderr is not None
    assert any("ready" in line for line in iter(running.stderr.readline, ""))
    running.send_signal(number)
    out, _ = running.communicate(timeout=60)
    assert running.returncode == 130 and json.loads(out)["code"] == "interrupted"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == [
        "kpt_test_slow_factory.py",
        "model.pt",
    ]


def test_a_signal_that_the_caller_ignores_stays_ignored():
    """As under ``nohup``; afterwards every handler is what it was."""
    before = signal.getsignal(signal.SIGTERM)
    kept = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with program._ended_like_ctrl_c():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not before
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGHUP, kept)
