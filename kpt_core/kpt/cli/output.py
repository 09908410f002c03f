"""What every command shares about results, errors and exit codes.

A result goes to stdout and everything else to stderr, whoever prints it: while a command runs, file
descriptor 1 points at stderr, so that a chatty factory or compiler cannot mix with the result.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

#: The least width of a table, in columns.
_NARROWEST = 80
DONE, FAILED, USAGE, FINDING, CREDENTIALS, QUOTA, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130


class CommandError(Exception):
    """A command cannot do what was asked. ``code`` is for programs, ``hint`` says what to do."""

    def __init__(self, code: str, message: str, hint: str = "", exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.exit_code = exit_code


def usage(message: str, hint: str = "") -> CommandError:
    """The error for arguments that make no sense."""
    return CommandError("usage", message, hint, USAGE)


@dataclass
class Output:
    """Where a command's result goes, and in which form."""

    json: bool = False
    stdout: TextIO = field(default_factory=lambda: sys.stdout)

    def console(self) -> Console:
        """A console on stdout, as wide as the terminal, or wide enough for any table in a pipe.

        Brackets in what it prints are brackets: reasons and names are other people's text.
        """
        from rich.console import Console

        def console(width: int | None) -> Console:
            return Console(file=self.stdout, width=width, highlight=False, markup=False, soft_wrap=False)

        if not self.stdout.isatty():
            return console(160)
        found = console(None)
        # Columns that are narrower cut names off; the lines that a narrow terminal breaks are whole.
        return found if found.width >= _NARROWEST else console(_NARROWEST)

    def mark(self, sign: str, plain: str) -> str:
        """``sign``, or ``plain`` where the encoding of stdout (that of ``LANG=C``) has no such letter."""
        try:
            sign.encode(getattr(self.stdout, "encoding", None) or "utf-8")
        except UnicodeEncodeError:
            return plain
        return sign

    def result(self, data: Mapping[str, Any], shown: RenderableType | None = None) -> None:
        """Print the command's one result: ``data`` with ``--json``, else ``shown``."""
        if self.json:
            print(json.dumps(_finite(data), indent=2, default=str), file=self.stdout)
        elif isinstance(shown, str):
            print(shown, file=self.stdout)
        elif shown is not None:
            self.console().print(shown)

    def error(self, error: CommandError) -> None:
        """Print an error: one object on stdout with ``--json``, else lines on stderr."""
        if self.json:
            data = {"code": error.code, "message": error.message, "hint": error.hint}
            print(json.dumps(data, indent=2), file=self.stdout)
            return
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  {error.hint}", file=sys.stderr)


def nobody_reads() -> None:
    """Give the streams that the caller closed (``>&-``) somewhere to go: Python has None for them."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))


@contextmanager
def flushed(stream: TextIO) -> Iterator[TextIO]:
    """``stream``, with what was written to it written through where the block ends."""
    try:
        yield stream
    finally:
        stream.flush()


def note(text: str) -> None:
    """A line for the user that is not the result."""
    print(text, file=sys.stderr)


@contextmanager
def only_results_on_stdout() -> Iterator[TextIO]:
    """Send everything that is printed inside the block to stderr; yields the real stdout."""
    sys.stdout.flush()
    try:
        own = sys.stdout.fileno() == 1
    except (OSError, ValueError):  # captured by a test or a notebook: there is no descriptor
        own = False
    if not own:
        real, sys.stdout = sys.stdout, sys.stderr
        try:
            yield real
        finally:
            sys.stdout = real
        return
    kept = os.dup(1)
    os.dup2(2, 1)
    stream = os.fdopen(kept, "w", encoding=sys.stdout.encoding, errors="backslashreplace", closefd=True)
    try:
        yield stream
    finally:
        sys.stdout.flush()
        try:
            stream.flush()
        finally:
            os.dup2(kept, 1)
            stream.close()


def _finite(value: Any) -> Any:
    """``value`` with the numbers that JSON lacks as null."""
    if isinstance(value, float):
        return value if value - value == 0.0 else None
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_finite(entry) for entry in value]
    return value
