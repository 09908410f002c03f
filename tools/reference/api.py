"""docs/reference/api.md, from the public names of `kpt`."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import kpt
from reference.markdown import fields, prose, signature

FUNCTIONS = ("optimize", "report", "restore", "refresh", "save", "load", "hardware")
CLASSES = ("Accuracy", "Receipt")


def page() -> str:
    """Signatures and docstrings of the public functions and classes."""
    parts = [
        "# Python interface",
        "`import kpt` loads neither torch nor any plugin; each name is loaded when it is first used.",
    ]
    for name in FUNCTIONS:
        function = getattr(kpt, name)
        parts += [
            f"## `kpt.{name}` {{ #{name} }}",
            f"```python\nkpt.{name}{broken(signature(function))}\n```",
            prose(function.__doc__),
        ]
    for name in CLASSES:
        kind = getattr(kpt, name)
        parts += [f"## `kpt.{name}` {{ #{name.lower()} }}", prose(kind.__doc__)]
        if dataclasses.is_dataclass(kind):
            parts.append(fields(kind))
        parts += members(kind)
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def members(kind: type) -> list[str]:
    """The public methods and properties of ``kind``, each with its docstring."""
    found = []
    for name, member in vars(kind).items():
        if name.startswith("_"):
            continue
        function: Any = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if not inspect.isfunction(function) or not function.__doc__:
            continue
        called = signature(function).replace("(self, ", "(").replace("(self)", "()").replace("(cls, ", "(")
        title = name if isinstance(member, property) else name + called
        found.append(f"`.{title}` — {prose(function.__doc__)}")
    return found


def broken(text: str) -> str:
    """A long signature with one parameter a line."""
    if len(text) < 80:
        return text
    inner, _, result = text[1:].rpartition(")")
    lines, depth, current = [], 0, ""
    for character in inner:
        depth += character in "[(" and 1 or character in "])" and -1 or 0
        if character == "," and depth == 0:
            lines.append(current.strip())
            current = ""
        else:
            current += character
    lines.append(current.strip())
    return "(\n" + "".join(f"    {line},\n" for line in lines) + ")" + result
