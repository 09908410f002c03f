"""What an error says, where it may be a stranger's: one without a message must not be a second error."""

from __future__ import annotations

import contextlib
import os
import re


def message_of(error: BaseException) -> str:
    """``str(error)`` without spaces around it, or a note that its ``__str__`` raised."""
    try:
        return str(error).strip()
    except (Exception, SystemExit):  # noqa: BLE001 - a hostile __str__ must not defeat the report of its error
        return "(its message cannot be shown)"


def described(error: BaseException) -> str:
    """``"Type: message"``."""
    return f"{type(error).__name__}: {message_of(error)}"


#: The end of a sentence, but not of an abbreviation.
_SENTENCE = re.compile(r"(?<=[a-z0-9)\]`'\"][a-z0-9)\]`'\"][.!?])\s+(?=[A-Z])")
#: What stands before a sentence to say what kind it is of.
_LABEL = re.compile(r"[A-Z]\w+: (?=[A-Z`'\"])")
_PLACE = re.compile(r'^\s*File "(?P<file>.+)", line (?P<line>\d+), in ', re.MULTILINE)
#: A first sentence that is shorter is a title: the indented one below it says what it is about.
_TITLE = 80
_LONGEST = 300


def summary(error: BaseException) -> str:
    """``"Type: message"`` in a sentence, for a receipt: what the error says first, and where in whose code.

    What libraries write after that is for those who mend the library: hints by the dozen, where to send a
    report, which variables give more output, stacks of their own.
    """
    text = message_of(error)
    lines = text.splitlines()
    told = _sentence(lines[0]) if lines else ""
    below = lines[1] if len(lines) > 1 else ""
    if told.endswith(":") or (below[:1].isspace() and len(told) < _TITLE):
        told = f"{told.rstrip(':')}: {_sentence(below)}".removesuffix(": ")
    if len(told) > _LONGEST:
        told = told[: _LONGEST - 2] + " …"
    places = list(_PLACE.finditer(text))
    if places:
        told += f" ({os.path.basename(places[-1]['file'])}, line {places[-1]['line']})"
    return f"{type(error).__name__}: {told}".removesuffix(": ")


def _sentence(line: str) -> str:
    """The first sentence of ``line``, without what announces it."""
    return _SENTENCE.split(_LABEL.sub("", line.strip(), count=1))[0].rstrip(". ")


def add_note(error: BaseException, note: str) -> None:
    """As `BaseException.add_note`, which Python 3.10 has not; an error without a dictionary goes without."""
    with contextlib.suppress(AttributeError, TypeError):
        error.__notes__ = [*getattr(error, "__notes__", ()), note]  # type: ignore[attr-defined]
