"""docs/reference/cli.md, from the functions that define the commands."""

from __future__ import annotations

import inspect
import typing
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
from typer.models import ArgumentInfo

from kpt.cli.main import COMMANDS
from reference.markdown import prose, table


def page() -> str:
    """Every command with its arguments and options."""
    parts = [
        "# Commands",
        "`kpt` is also installed as `kernelpytorch`, and `kpt-optimize` is `kpt optimize`. "
        "[The guide](../cli.md) explains them by example.",
    ]
    parts += [section(name, *entry) for name, entry in COMMANDS.items()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def section(name: str, module: str, summary: str) -> str:
    """One command: usage, docstring, tables of arguments and options."""
    function = import_module(module).command
    hints = typing.get_type_hints(function, include_extras=True)
    arguments, options = [], []
    usage = [f"kpt {name}"]
    for parameter in inspect.signature(function).parameters.values():
        kind, *metadata = typing.get_args(hints[parameter.name]) or (hints[parameter.name],)
        if kind is typer.Context or parameter.name == "context":
            continue
        info = next(item for item in metadata if hasattr(item, "help"))
        needed = parameter.default is inspect.Parameter.empty
        if isinstance(info, ArgumentInfo):
            shown = info.metavar or parameter.name.upper()
            usage.append(shown if needed else f"[{shown}]")
            arguments.append([f"`{shown}`", info.help or ""])
        else:
            declared = names_of(parameter, info)
            if needed:
                usage.append(f"{declared[0]} {takes(kind, info)}")
            names = ", ".join(f"`{each}`" for each in declared)
            options.append([names, cell_of(takes(kind, info)), default(parameter), info.help or ""])
    parts = [
        f"## `kpt {name}` {{ #{name.replace(' ', '-')} }}",
        f"```text\n{' '.join([*usage, '[OPTIONS]'] if options else usage)}\n```",
        prose(function.__doc__) or summary,
    ]
    if arguments:
        parts.append(table(["argument", "meaning"], arguments))
    if options:
        parts.append(table(["option", "takes", "default", "meaning"], options))
    return "\n\n".join(part.strip() for part in parts)


def names_of(parameter: inspect.Parameter, info: Any) -> list[str]:
    """An option's names; in an annotation, typer keeps the first of them where a default would be."""
    given = [info.default] if isinstance(info.default, str) and info.default.startswith("-") else []
    return [*given, *(info.param_decls or ())] or [f"--{parameter.name.replace('_', '-')}"]


def takes(kind: Any, info: Any) -> str:
    """What follows an option: its metavar, or a word for its type; nothing for a flag."""
    repeatable = typing.get_origin(kind) in (list, tuple)
    inner = (typing.get_args(kind) or (str,))[0] if repeatable else kind
    if inner is bool:
        return ""
    words = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}
    word = info.metavar or words.get(inner, getattr(inner, "__name__", str(inner)).upper())
    return f"{word.rstrip(',…')}…" if repeatable else word


def cell_of(text: str) -> str:
    return f"`{text}`" if text else ""


def default(parameter: inspect.Parameter) -> str:
    """The default as it would be typed; nothing where it means "not given"."""
    value = parameter.default
    if value is inspect.Parameter.empty:
        return "required"
    if value is None or value is False or value in ("", [], (), Path()):
        return ""
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"
