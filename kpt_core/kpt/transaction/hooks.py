"""The user's hooks do not fire for what kpt does: a run calls the model hundreds of times."""

from __future__ import annotations

import functools
import itertools
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules import module as torch_module


def global_hooks() -> bool:
    """Whether somebody listens to every module of the process: an optimised forward runs few of them."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def is_own(model: torch.nn.Module, hook: Any) -> bool:
    """Whether a hook is the model's own code: a function of the installed library that defines its class.

    Such a library registers hooks to collect what submodules return (hidden states), when it is first asked
    for that. They belong to the forward; all other hooks are somebody's who wants to hear of each call.
    """
    library = _library(type(model).__module__)
    return (
        library is not None and isinstance(hook, types.FunctionType) and _library(hook.__module__) == library
    )


@functools.lru_cache(maxsize=1024)
def _library(module: str | None) -> str | None:
    """The installed package that ``module`` is part of; torch's hooks are tools for everybody's models."""
    package = (module or "").partition(".")[0]
    file = getattr(sys.modules.get(package), "__file__", None)
    installed = file is not None and not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)
    return package if installed and package != "torch" else None


@contextmanager
def silent(model: torch.nn.Module) -> Iterator[None]:
    """Keep hooks of the model's tensors from firing inside the block.

    A workspace shares the user's parameters, so that each gradient taken in a trial would pass through
    them. Autograd reads the very dictionary that a hook is registered in: it is emptied and filled again.
    """
    kept: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
    try:
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            table = tensor._backward_hooks
            if table:
                kept.append((table, dict(table)))
                table.clear()
        yield
    finally:
        for table, hooks in kept:
            added = {key: hook for key, hook in table.items() if key not in hooks}
            table.clear()
            table.update({**hooks, **added})
