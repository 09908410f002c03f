"""Turning docstrings and annotations into Markdown."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any


def prose(docstring: str | None) -> str:
    """A docstring as Markdown: double backticks become single ones, examples become code blocks."""
    text = inspect.cleandoc(docstring or "").replace("``", "`")
    return re.sub(r"^(>>> (?:.|\n)*?)(?=\n\n|\Z)", r"```python\n\1\n```", text, flags=re.MULTILINE)


def cell(text: str) -> str:
    """``text`` fit for a table's cell."""
    return " ".join(text.split()).replace("|", "\\|")


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def annotation(value: Any) -> str:
    """An annotation as it is written in the source."""
    return value if isinstance(value, str) else getattr(value, "__name__", str(value))


def signature(function: Any) -> str:
    """``(parameter: type = default, …) -> type`` without the quotes that string annotations get."""
    text = str(inspect.signature(function))
    text = re.sub(r"(?<=[:>\[,|] )'([^']*)'|(?<=->)'([^']*)'", lambda m: m.group(1) or m.group(2), text)
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def fields(kind: type) -> str:
    """A table of a dataclass's fields: name, type, default."""
    rows = []
    for field in dataclasses.fields(kind):
        if field.default is not dataclasses.MISSING:
            default = f"`{field.default!r}`".replace("mappingproxy({})", "{}")
        elif field.default_factory is not dataclasses.MISSING:
            default = f"`{field.default_factory()!r}`".replace("mappingproxy({})", "{}")
        else:
            default = "required"
        rows.append(
            [f"`{field.name}`", f"`{annotation(field.type)}`", default.replace("mappingproxy({})", "{}")]
        )
    return table(["field", "type", "default"], rows)
