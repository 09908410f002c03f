"""Let one module instance call something else by a name that its code uses.

A private copy of the calling method gets its own globals, in which the name stands for the kernel.
The module that the code was imported from, its class and all other instances stay as they are.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from kpt.ops.sites import Site


class FunctionTable:
    """Stands in for a table of functions, and returns another one for a single entry."""

    def __init__(self, table: Any, original: Any, replacement: Any) -> None:
        self._table = table
        self._original = original
        self._replacement = replacement

    def _swap(self, value: Any) -> Any:
        return self._replacement if value is self._original else value

    def __getitem__(self, key: Any) -> Any:
        return self._swap(self._table[key])

    def get(self, key: Any, default: Any = None) -> Any:
        return self._swap(self._table.get(key, default))

    def get_interface(self, name: Any, default: Any = None) -> Any:
        """The lookup of transformers' attention interface."""
        return self._swap(self._table.get_interface(name, default))

    def __contains__(self, key: Any) -> bool:
        return key in self._table


def bind_function(module: torch.nn.Module, site: Site, kernel: Callable[..., Any]) -> Any:
    """A bound copy of the method of ``module`` that calls ``site.callee``, with ``kernel`` in its place.

    Several sites of one method compose: what is bound to the instance already is copied further.
    Raises `ValueError` when the method does not name the callee.
    """
    original = site.original
    if original is None:
        raise ValueError(f"{site.name} is not the site of a function or call")
    replacement = original
    for served in (*reversed(site.others), site):
        replacement = served.binding.function(kernel, replacement, module)
    bound = getattr(module, site.attribute)
    function = getattr(bound, "__func__", None)
    if function is None or bound.__self__ is not module:
        raise ValueError(f"{site.attribute} of {site.path or 'the root'} is not a method bound to it")
    copy = _rebound(function, site.callee, original, replacement, set())
    if copy is None:
        raise ValueError(f"{site.attribute} of {site.path or 'the root'} does not call {site.callee}")
    return types.MethodType(copy, module)


def _rebound(
    function: types.FunctionType, callee: str, original: Any, replacement: Any, seen: set[int], depth: int = 4
) -> types.FunctionType | None:
    """A copy of ``function`` in which ``callee`` is ``replacement``; None when it does not use the name."""
    first = callee.removesuffix("[]").partition(".")[0]
    scope = function.__globals__
    closure = function.__closure__
    if first in function.__code__.co_names and first in scope and _holds(scope[first], callee, original):
        scope = {**scope, first: _replaced(scope[first], callee, original, replacement)}
        # dynamo looks globals up in the module of this name, where the replacement is not
        scope.pop("__name__", None)
    elif depth and closure:
        cells = list(closure)
        changed = False
        for index, cell in enumerate(closure):
            try:
                inner = cell.cell_contents
            except ValueError:
                continue
            if isinstance(inner, types.FunctionType) and id(inner) not in seen:
                seen.add(id(inner))
                copy = _rebound(inner, callee, original, replacement, seen, depth - 1)
                if copy is not None:
                    cells[index] = types.CellType(copy)
                    changed = True
        if not changed:
            return None
        closure = tuple(cells)
    else:
        return None
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__qualname__ = function.__qualname__
    copy.__module__ = function.__module__
    copy.__doc__ = function.__doc__
    copy.__dict__.update(function.__dict__)
    return copy


def _holds(root: Any, callee: str, original: Any) -> bool:
    if callee.endswith("[]"):
        table = root._table if isinstance(root, FunctionTable) else root
        return any(value is original for value in table.values())
    for part in callee.split(".")[1:]:
        root = getattr(root, part, None)
    return root is original


def _replaced(root: Any, callee: str, original: Any, replacement: Any) -> Any:
    if callee.endswith("[]"):
        return FunctionTable(root, original, replacement)
    path = callee.split(".")[1:]
    if not path:
        return replacement
    copy = types.ModuleType(root.__name__)
    copy.__dict__.update(root.__dict__)
    inner = _replaced(getattr(root, path[0]), ".".join(path), original, replacement)
    copy.__dict__[path[0]] = inner
    return copy
