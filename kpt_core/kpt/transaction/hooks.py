"""The user's hooks do not fire for what kpt does: a run calls the model hundreds of times."""

from __future__ import annotations

import functools
import itertools
import re
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules import module as torch_module
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

#: Methods of a module that register hooks.
_REGISTERS = re.compile(r"register_(full_)?(forward|backward)(_pre)?_hook$")
#: Hooks of torch's that compute a tensor of their module before each call of it, and where each has its name.
_COMPUTING = ((WeightNorm, "name"), (SpectralNorm, "name"), (BasePruningMethod, "_tensor_name"))


def global_hooks() -> bool:
    """Whether somebody listens to every module of the process: an optimised forward runs few of them."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def computed(module: torch.nn.Module) -> frozenset[str]:
    """The attributes of ``module`` that hooks of torch's compute anew before each call of it."""
    table: dict[Any, Any] = module.__dict__.get("_forward_pre_hooks") or {}
    return frozenset(name for hook in table.values() if (name := _computes(hook)) is not None)


def _computes(hook: Any) -> str | None:
    """The attribute that ``hook`` sets, if it is a weight norm, a spectral norm or a pruning of torch's."""
    return next((getattr(hook, name, None) for kind, name in _COMPUTING if isinstance(hook, kind)), None)


def is_own(model: torch.nn.Module, hook: Any) -> bool:
    """Whether a hook is the model's own code: a function of the installed library that defines its class,
    and one that this library itself registers, or one of torch's that computes a weight of its module.

    Such a library registers hooks to collect what submodules return (hidden states), when first asked
    for that. They belong to the forward. All other hooks are somebody's who wants to hear of each call,
    though it be with a function that the library offers.
    """
    if _computes(hook) is not None:
        return True
    library = _library(type(model).__module__)
    if library is None or not isinstance(hook, types.FunctionType) or _library(hook.__module__) != library:
        return False
    return _registers(library, hook.__code__)


@functools.lru_cache(maxsize=1024)
def _registers(library: str, hook: types.CodeType) -> bool:
    """Whether a function of ``library`` registers hooks, and makes or names the function of this code."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != library or not isinstance(module, types.ModuleType):
            continue
        functions = {key: v for key, v in vars(module).items() if isinstance(v, types.FunctionType)}
        known_as = {key for key, function in functions.items() if function.__code__ is hook}
        for code in _code_of(module):
            if any(map(_REGISTERS.match, code.co_names)) and (
                hook in code.co_consts or not known_as.isdisjoint(code.co_names)
            ):
                return True
    return False


def _code_of(module: types.ModuleType) -> Iterator[types.CodeType]:
    """The code of all functions that ``module`` defines, those of its classes and inside others included."""
    pending: list[Any] = []
    for value in list(vars(module).values()):
        if isinstance(value, type) and value.__module__ == module.__name__:
            pending.extend(vars(value).values())
        elif isinstance(value, types.FunctionType) and value.__module__ == module.__name__:
            pending.append(value)
    seen: set[types.CodeType] = set()
    while pending:
        item = pending.pop()
        if isinstance(item, (staticmethod, classmethod, property)):
            item = item.fget if isinstance(item, property) else item.__func__
        if isinstance(item, types.FunctionType):
            pending.append(getattr(item, "__wrapped__", None))
            item = item.__code__
        if isinstance(item, types.CodeType) and item not in seen:
            seen.add(item)
            yield item
            pending.extend(item.co_consts)


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
