"""docs/reference/cli.md, from the command line's own definition."""

from __future__ import annotations

import inspect
from typing import Any

import click
import typer
from kpt.cli.main import app

from reference.markdown import table


def page() -> str:
    """Every command with its arguments and options."""
    parts = [
        "# Commands",
        "`kpt` is also installed as `kernelpytorch`. [The guide](../cli.md) explains them by example.",
    ]
    root = typer.main.get_command(app)
    for name, command in commands(root, "kpt"):
        parts.append(section(name, command))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def commands(command: Any, name: str) -> list[tuple[str, Any]]:
    """``command`` and those below it, each with its full name."""
    found = [(name, command)]
    for child_name, child in sorted(getattr(command, "commands", {}).items()):
        if not child.hidden:
            found += commands(child, f"{name} {child_name}")
    return found


def section(name: str, command: Any) -> str:
    context = click.Context(command, info_name=name) if not hasattr(command, "context_class") else None
    context = context or command.context_class(command, info_name=name)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    parts = [f"## `{name}`", inspect.cleandoc(command.help or ""), f"```text\n{usage}\n```"]
    arguments, options = [], []
    for parameter in command.params:
        if getattr(parameter, "hidden", False) or parameter.name in {"install_completion", "show_completion"}:
            continue
        text = getattr(parameter, "help", None) or ""
        if parameter.param_type_name == "argument":
            needed = "" if parameter.required else " (optional)"
            arguments.append([f"`{parameter.human_readable_name}`{needed}", text])
        else:
            names = " / ".join(f"`{option}`" for option in [*parameter.opts, *parameter.secondary_opts])
            options.append([names, kind(parameter), default(parameter), text])
    if arguments:
        parts.append(table(["argument", "meaning"], arguments))
    if options:
        parts.append(table(["option", "takes", "default", "meaning"], options))
    return "\n\n".join(part.strip() for part in parts if part.strip())


def kind(parameter: Any) -> str:
    """What an option takes: nothing for a flag, its choices, or a type's name."""
    if parameter.is_flag:
        return ""
    choices = getattr(parameter.type, "choices", None)
    if choices:
        return ", ".join(f"`{getattr(choice, 'value', choice)}`" for choice in choices)
    return parameter.type.name + (", repeatable" if parameter.multiple else "")


def default(parameter: Any) -> str:
    value = parameter.default
    if parameter.required:
        return "required"
    if value is None or value is False or value == () or callable(value) or "UNSET" in repr(value).upper():
        return ""
    return f"`{getattr(value, 'value', value)}`"
