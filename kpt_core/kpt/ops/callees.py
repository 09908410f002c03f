"""Which code a forward runs: its methods, the functions that they call, and what those are called."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F


def forward_signature(module: torch.nn.Module) -> inspect.Signature | None:
    try:
        return inspect.signature(module.forward)
    except (TypeError, ValueError):
        return None


@lru_cache(maxsize=4096)
def methods(cls: type) -> dict[types.CodeType, str]:
    """The code of each Python method of a module class (also inside decorators), by its name."""
    found: dict[types.CodeType, str] = {}
    for base in cls.__mro__:
        if base is torch.nn.Module or base is object:
            break
        for name, value in vars(base).items():
            if isinstance(value, types.FunctionType) and not name.startswith("__"):
                for code in codes_of(value):
                    found.setdefault(code, name)
    return found


def codes_of(function: types.FunctionType, depth: int = 4) -> Iterator[types.CodeType]:
    """The function's code and that of functions it closes over (what decorators leave behind)."""
    yield function.__code__
    if depth:
        for cell in function.__closure__ or ():
            try:
                inner = cell.cell_contents
            except ValueError:
                continue
            if isinstance(inner, types.FunctionType):
                yield from codes_of(inner, depth - 1)


def callee_name(
    caller: types.CodeType, names: Mapping[str, Any], matches: Callable[[Any], bool]
) -> str | None:
    """How ``caller`` names a callee among its globals: ``f``, ``F.f``, ``torch.nn.f``, ``TABLE[]``."""
    spelled = caller.co_names
    for name in spelled:
        if name in names and matches(names[name]):
            return name
    for name in spelled:
        root = names.get(name)
        if isinstance(root, types.ModuleType):
            for path in _attributes(root, spelled, 3):
                if matches(path[1]):
                    return f"{name}.{path[0]}"
    for name in spelled:
        table = names.get(name)
        if isinstance(table, Mapping) and any(matches(value) for value in list(table.values())):
            return f"{name}[]"
    return None


def _attributes(root: types.ModuleType, names: Iterable[str], depth: int) -> Iterator[tuple[str, Any]]:
    """What can be reached from a package through attributes in ``names``, the shortest paths first."""
    level: list[tuple[str, Any]] = [("", root)]
    for _ in range(depth):
        below: list[tuple[str, Any]] = []
        for path, package in level:
            for name in names:
                value = vars(package).get(name)
                if value is not None and value is not package:
                    yield path + name, value
                    if isinstance(value, types.ModuleType):
                        below.append((f"{path}{name}.", value))
        level = below


def held_callee(module: torch.nn.Module, caller: types.CodeType, code: types.CodeType) -> str | None:
    """``self.name`` if the module holds the function under a name that the caller uses."""
    for name in caller.co_names:
        held = vars(module).get(name)
        if held is None and isinstance(getattr(type(module), name, None), property):
            held = getattr(module, name)
        if isinstance(held, types.FunctionType) and held.__code__ is code:
            return f"self.{name}"
    return None


def resolve_callee(callee: str, names: Mapping[str, Any], code: types.CodeType | None = None) -> Any:
    """The function behind a callee name, as `callee_name` spells it."""
    if callee.endswith("[]"):
        for value in names[callee[:-2]].values():
            if code is None or getattr(value, "__code__", None) is code:
                return value
        return None
    first, *rest = callee.split(".")
    value = names.get(first)
    for part in rest:
        value = getattr(value, part, None)
    return value


def builtin_signature(function: Any) -> inspect.Signature | None:
    """The signature of a Python function, or of one of the few builtins that are watched."""
    if function is F.scaled_dot_product_attention:
        return inspect.signature(_sdpa_signature)
    if function is torch.softmax:
        return inspect.signature(_softmax_signature)
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def _sdpa_signature(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    """The signature of ``scaled_dot_product_attention``, which is a builtin without one."""


def _softmax_signature(input: Any, dim: Any, dtype: Any = None) -> None:
    """The signature of ``torch.softmax``."""
