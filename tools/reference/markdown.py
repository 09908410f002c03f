"""Turning docstrings and annotations into Markdown."""

from __future__ import annotations

import dataclasses
import html
import inspect
import re
from typing import Any


def prose(docstring: str | None) -> str:
    """A docstring as Markdown: double backticks become single ones, sections lists, examples code blocks."""
    text = inspect.cleandoc(docstring or "").replace("``", "`")
    text = re.sub(r"^(Args|Raises|Returns)[^\n]*:\n((?: +.*\n?)+)", _section, text, flags=re.MULTILINE)
    return re.sub(r"^(>>> (?:.|\n)*?)(?=\n\n|\Z)", r"```python\n\1\n```", text, flags=re.MULTILINE)


def _section(found: re.Match[str]) -> str:
    """``Args:`` and the like, with an item for each line that is indented least."""
    lines = inspect.cleandoc("\n" + found.group(2)).splitlines()
    items: list[str] = []
    for line in lines:
        if line.startswith(" ") and items:
            items[-1] += " " + line.strip()
        elif line.strip():
            items.append(line.strip())
    title = {"Args": "Arguments"}.get(found.group(1), found.group(1))
    named = [re.sub(r"^([\w., *]+): ", r"`\1` — ", item) for item in items]
    return f"**{title}**\n\n" + "\n".join(f"- {item}" for item in named) + "\n"


def cell(text: str) -> str:
    """``text`` fit for a table's cell: one line, no column breaks, no tags outside of code."""
    parts = " ".join(text.split()).split("`")
    for position, part in enumerate(parts):
        escaped = html.escape(part, quote=False).replace("|", "&#124;")
        if position % 2 == 0:
            parts[position] = escaped
        elif "|" in part:  # a bar inside of backticks would end the cell in some renderers
            parts[position] = f"<code>{escaped}</code>"
        else:
            parts[position] = f"`{part}`"
    return "".join(parts)


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


def fields(kind: Any) -> str:
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
