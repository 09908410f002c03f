"""Names that code mentions, and the code that it may call."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

import torch

_CONSTRUCTORS = frozenset({"__init__", "__post_init__"})  # what has made an object at hand is over


def names_mentioned(functions: Iterable[Any], held: Iterable[Any]) -> set[str]:
    """Names that the code of ``functions`` mentions, and that of what it may call.

    That is what it reaches by names: functions among its globals, in modules or tables there, or imported by
    itself, methods of classes and objects there, of its own class, and of the objects that the modules have
    in ``held``. Constructors count by their own code alone: a class is named to be called, but also to be
    compared with.
    """
    names: set[str] = set()
    constructed: set[str] = set()
    seen: set[tuple[types.FunctionType, type | None]] = set()
    holding = {type(value) for value in held}
    pending: list[tuple[Any, type | None]] = [(value, None) for value in (*functions, *held)]
    while pending:
        value, owner = pending.pop()
        function = _python_function(value)
        if function is None or (function, owner) in seen or _indifferent(function.__module__):
            continue
        seen.add((function, owner))
        called, mentioned = names_in(function.__code__)
        new = mentioned - names
        names |= mentioned
        pending += [(cell.cell_contents, owner) for cell in function.__closure__ or () if not _is_empty(cell)]
        for other in _reached(function.__globals__, called):
            own = other if isinstance(other, type) else type(other)
            pending += [(other, None), *_methods_of(own, called - _CONSTRUCTORS | {"__call__"})]
            if own is other:
                for constructor, _ in _methods_of(own, _CONSTRUCTORS):
                    constructed |= names_in(constructor.__code__)[1]
        if owner is not None:
            pending += _methods_of(owner, called - _CONSTRUCTORS)
        for own in holding if new else ():
            pending += _methods_of(own, new - _CONSTRUCTORS | {"__call__"})
    return names | constructed


def names_in(code: types.CodeType) -> tuple[set[str], set[str]]:
    """The names in ``code`` and in the code inside it, and these with all strings."""
    names, strings = set(code.co_names), set()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner, more = names_in(constant)
            names |= inner
            strings |= more
        elif isinstance(constant, str):  # getattr(config, "name", ...)
            strings.add(constant)
    return names, names | strings


def _reached(scope: Mapping[str, Any], names: set[str]) -> list[Any]:
    """What ``names`` lead to from the globals ``scope``, through modules, and functions in tables there."""
    found: list[Any] = []
    packages: set[int] = set()
    level = [scope[name] if name in scope else sys.modules.get(name) for name in names]
    while level:
        value = level.pop()
        if not isinstance(value, types.ModuleType):
            found.append(value)
            if isinstance(value, dict):  # a lazy one may import much when it is asked
                found += [entry for entry in dict.values(value) if _python_function(entry) is not None]
        elif id(value) not in packages and not _indifferent(value.__name__):
            packages.add(id(value))
            level += [vars(value)[name] for name in names if name in vars(value)]
    return found


def _methods_of(owner: type, names: Set[str]) -> Iterator[tuple[types.FunctionType, type]]:
    """The methods and properties of a class and its bases that are among ``names``, with the class."""
    if issubclass(owner, torch.autograd.Function):
        names = names | {"forward"}  # which `apply` calls
    for base in owner.__mro__:
        for name in () if _indifferent(base.__module__) else names & vars(base).keys():
            member = vars(base)[name]
            function = member.fget if isinstance(member, property) else member
            function = _python_function(getattr(function, "__func__", function))
            if function is not None:
                yield function, owner


def _python_function(value: Any) -> types.FunctionType | None:
    """The function behind a bound method, a partial function, or itself; None for anything else."""
    while isinstance(value, (types.MethodType, functools.partial)):
        value = value.__func__ if isinstance(value, types.MethodType) else value.func
    return value if isinstance(value, types.FunctionType) else None


def _is_empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def _indifferent(module: str | None) -> bool:
    """Whether code of ``module`` knows nobody's config: that of torch and of Python's own library."""
    package = (module or "").partition(".")[0]
    return package in ("torch", "numpy") or package in sys.stdlib_module_names
