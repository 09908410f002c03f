"""What the leaves of a call are called: by the parameters that they bind to, and the paths inside them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kpt.judge import tree
from kpt.judge.calls import Call


def named_leaves(call: Call) -> list[tuple[tree.Path, Any]]:
    """Every leaf with its path, which starts with "args" or "kwargs"."""
    return [
        *((("args", *path), leaf) for path, leaf in tree.walk(call.args)),
        *((("kwargs", *path), leaf) for path, leaf in tree.walk(call.kwargs)),
    ]


def positional_names(forward: Callable[..., Any] | None) -> tuple[str, ...]:
    """The names of the parameters that positional arguments bind to, as far as they have names."""
    if forward is None:
        return ()
    target = forward.forward if isinstance(forward, torch.nn.Module) else forward
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return ()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)


def leaf_name(path: tree.Path, parameters: Sequence[str]) -> str:
    """``("args", 0, "ids")`` as ``batch.ids`` for a forward whose first parameter is ``batch``."""
    kind, first, *rest = path
    if kind == "kwargs":
        return tree.spell((first, *rest))
    head = parameters[first] if first < len(parameters) else f"args[{first}]"
    return tree.spell((head, *rest))
