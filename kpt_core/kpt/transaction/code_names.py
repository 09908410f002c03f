"""Names in the code of functions: those that it mentions, reads as globals, assigns, and imports."""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

#: Functions, modules and attributes by which code reads a global that it does not name, or names in a string.
_BY_NAME = frozenset(("globals", "vars", "eval", "exec", "sys", "importlib", "import_module", "__import__"))
_BY_ATTRIBUTE = frozenset(("globals", "__globals__", "f_globals", "import_module", "__import__"))
_IMPORTED = _BY_NAME | {"builtins", "inspect"}


@functools.lru_cache(maxsize=4096)
def mentioned(code: types.CodeType) -> frozenset[str]:
    """The names and strings that ``code`` and the functions inside it mention."""
    return frozenset({*code.co_names, *_strings(code.co_consts)}).union(*map(mentioned, _inner(code)))


def _strings(constants: Iterable[Any]) -> Iterator[str]:
    for constant in constants:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, (tuple, frozenset)):
            yield from _strings(constant)


@functools.lru_cache(maxsize=4096)
def _operations(code: types.CodeType) -> frozenset[tuple[str, str]]:
    """The instructions of ``code`` and the functions inside it that have a name, with that name."""
    own = ((i.opname, i.argval) for i in dis.get_instructions(code) if isinstance(i.argval, str))
    return frozenset(own).union(*map(_operations, _inner(code)))


def global_names(code: types.CodeType) -> frozenset[str]:
    """The names that ``code`` reads as globals: those of attributes are others."""
    return frozenset(name for kind, name in _operations(code) if kind == "LOAD_NAME" or "GLOBAL" in kind)


@functools.lru_cache(maxsize=4096)
def reads_by_name(code: types.CodeType) -> bool:
    """Whether ``code`` may ask for a global that it does not name: strings of its own, or of others, do."""
    attributes = named(code, "LOAD_ATTR") | named(code, "LOAD_METHOD") | {*_strings(code.co_consts)}
    imported = named(code, "IMPORT_NAME") | named(code, "IMPORT_FROM")
    return not (
        _BY_NAME.isdisjoint(global_names(code))
        and _BY_ATTRIBUTE.isdisjoint(attributes)
        and _IMPORTED.isdisjoint(imported)
    )


def named(code: types.CodeType, operation: str) -> frozenset[str]:
    """The names that ``code`` has for instructions called ``operation``."""
    return frozenset(name for kind, name in _operations(code) if kind == operation)


def imported(function: types.FunctionType) -> Iterator[types.ModuleType]:
    """The modules that a call of ``function`` imports, as far as they are loaded.

    Of a relative import all parents of its package are asked.
    """
    code = function.__code__
    names, parts = named(code, "IMPORT_NAME"), named(code, "IMPORT_FROM")
    package = str(function.__globals__.get("__package__") or "")
    parents = [""]
    while package:
        parents.append(package)
        package = package.rpartition(".")[0]
    for name in names:
        for parent in parents:
            module = sys.modules.get(f"{parent}.{name}".strip("."))
            if isinstance(module, types.ModuleType):
                yield module
                below = (sys.modules.get(f"{module.__name__}.{part}") for part in parts)
                yield from (part for part in below if isinstance(part, types.ModuleType))


def _inner(code: types.CodeType) -> Iterator[types.CodeType]:
    return (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
