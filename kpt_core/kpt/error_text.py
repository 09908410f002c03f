"""What an error says, where it may be a stranger's: one without a message must not be a second error."""

from __future__ import annotations

import contextlib


def message_of(error: BaseException) -> str:
    """``str(error)`` without spaces around it, or a note that its ``__str__`` raised."""
    try:
        return str(error).strip()
    except (Exception, SystemExit):  # noqa: BLE001 - a hostile __str__ must not defeat the report of its error
        return "(its message cannot be shown)"


def described(error: BaseException) -> str:
    """``"Type: message"``."""
    return f"{type(error).__name__}: {message_of(error)}"


def add_note(error: BaseException, note: str) -> None:
    """As `BaseException.add_note`, which Python 3.10 has not; an error without a dictionary goes without."""
    with contextlib.suppress(AttributeError, TypeError):
        error.__notes__ = [*getattr(error, "__notes__", ()), note]  # type: ignore[attr-defined]
