"""The program: picks the command, runs it, turns what it raises into a message and an exit code.

Only the command that was called is imported; of the others the help shows a line. That keeps
``kpt --help`` fast however many commands and options there are.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from kpt.cli.output import (
    FAILED,
    INTERRUPTED,
    CommandError,
    Output,
    flushed,
    nobody_reads,
    only_results_on_stdout,
)

if TYPE_CHECKING:
    import typer

#: Command → (module that defines it, its line in the help). Groups have a space in the key.
COMMANDS: dict[str, tuple[str, str]] = {
    "optimize": ("kpt.cli.optimize", "Optimise a model file and write an artifact with its receipt."),
    "explain": ("kpt.cli.explain", "Say what was tried, kept and rejected, or what kpt sees in a model."),
    "bench": ("kpt.cli.bench", "Time a model under every installed contender, in one interleaved run."),
    "doctor": ("kpt.cli.doctor", "Examine the installation; name every fault with a command that mends it."),
    "plugins list": ("kpt.cli.plugins_list", "List the installed plugins and their states."),
    "plugins show": ("kpt.cli.plugins_show", "Show what one plugin offers."),
    "plugins new": ("kpt.cli.plugins_new", "Write the skeleton of a plugin, with its tests."),
    "plugins check": ("kpt.cli.plugins_check", "Run the conformance suite on a plugin."),
}
_GROUPS = {"plugins": "List, show, write and check plugins."}
_OPTIMIZE_PROGRAM = "kpt-optimize"


def build(called: str | None = None) -> typer.Typer:
    """The application; with ``called`` only that command is complete, the others are their help line."""
    import typer

    app = typer.Typer(
        name="kpt",
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        help="Make a PyTorch model faster, prove that it is still right, undo what does not pay.",
    )

    @app.callback()
    def _root(
        version: bool = typer.Option(False, "--version", help="Print the version.", callback=_print_version),
    ) -> None:
        pass

    groups: dict[str, typer.Typer] = {}
    for name, text in _GROUPS.items():
        groups[name] = typer.Typer(rich_markup_mode=None, help=text)
        app.add_typer(groups[name], name=name)
    for key, (module, text) in COMMANDS.items():
        group, _, name = key.rpartition(" ")
        function = import_module(module).command if called in (None, key) else _unused
        (groups[group] if group else app).command(name, short_help=text)(function)
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None and os.path.basename(sys.argv[0]) == _OPTIMIZE_PROGRAM:
        arguments.insert(0, "optimize")
    return run(arguments)


def optimize_main() -> int:
    """The program ``kpt-optimize``: the command ``optimize`` itself."""
    return run(["optimize", *sys.argv[1:]])


def run(arguments: list[str]) -> int:
    """Run ``arguments``; every error becomes a message and an exit code."""
    arguments = ["--help" if argument == "-h" else argument for argument in arguments]
    if not arguments or arguments in [[group] for group in _GROUPS]:
        arguments = [*arguments, "--help"]
    nobody_reads()
    output = Output(json="--json" in arguments)
    # Help is the result then, and typer prints it itself.
    helps = "--help" in arguments or arguments[0] == "--version"
    try:
        with _ended_like_ctrl_c(), flushed(sys.stdout) if helps else only_results_on_stdout() as stdout:
            output.stdout = stdout
            try:
                code = _call(arguments, output)
                if code == INTERRUPTED:  # newer versions of typer turn Ctrl-C into this number themselves
                    raise KeyboardInterrupt
                return code
            except KeyboardInterrupt:
                output.error(CommandError("interrupted", "Interrupted.", "", INTERRUPTED))
                return INTERRUPTED
            except BrokenPipeError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever a command raises becomes a message
                failure = translate(error)
                output.error(failure)
                return failure.exit_code
    except OSError as error:
        # Commands' own errors never get here: this is about what was left to write to stdout.
        # Python must not try it again on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not isinstance(error, BrokenPipeError):  # there, the reader (head, less) has seen enough
            print(f"error: The result cannot be written to standard output: {error}.", file=sys.stderr)
        return FAILED


@contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """Let what ends the program from outside (a scheduler, a terminal that is closed) end it as Ctrl-C does:
    no half of an artifact and no compiler's process stays behind. A second signal ends it at once.
    """

    def interrupt(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt

    taken: list[int] = []
    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
                if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores one
                    signal.signal(number, interrupt)
                    taken.append(number)
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _call(arguments: list[str], output: Output) -> int:
    words = [word for word in arguments if not word.startswith("-")]
    called = next((key for key in (" ".join(words[:2]), " ".join(words[:1])) if key in COMMANDS), "")
    app = build(called)
    result = app(arguments, standalone_mode=False, prog_name="kpt", obj=output)
    return result if isinstance(result, int) else 0


def translate(error: Exception) -> CommandError:
    """What ``error`` means to a user."""
    from kpt.modelfiles.base import ModelFileError
    from kpt.plugins.status import PluginError
    from kpt.user_cache import CacheError

    if os.environ.get("KPT_TRACEBACK"):
        import traceback

        traceback.print_exception(error)
    if isinstance(error, CommandError):
        return error
    if isinstance(error, ModelFileError):
        usage_codes = ("not-found", "needs-arch", "bad-arch", "not-a-file")
        return CommandError(error.code, error.message, error.hint, 2 if error.code in usage_codes else FAILED)
    if isinstance(error, PluginError):
        return CommandError("plugin", error.message, f"To mend it: {error.mend}" if error.mend else "")
    if isinstance(error, CacheError):
        return CommandError("cache", error.message, f"To mend it: {error.mend}" if error.mend else "")
    if hasattr(error, "code") and hasattr(error, "hint"):  # ArtifactError, whose module imports torch
        return CommandError(str(error.code), str(getattr(error, "message", error)), str(error.hint))
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # typer's, wherever it lives
        return CommandError("usage", error.format_message(), "See kpt --help.", int(error.exit_code))
    if type(error).__name__ == "Abort":
        return CommandError("interrupted", "Interrupted.", "", INTERRUPTED)
    message = f"{type(error).__name__}: {error}".rstrip(": ")
    return CommandError("failed", message, "Set KPT_TRACEBACK=1 to see where it was raised.")


def _print_version(wanted: bool) -> None:
    if wanted:
        import typer

        from kpt import __version__

        print(f"kpt {__version__}")
        raise typer.Exit


def _unused() -> None:
    """Stands for a command that was not called."""


def __getattr__(name: str) -> Any:
    if name == "app":
        return build()
    raise AttributeError(f"module 'kpt.cli.main' has no attribute {name!r}")
