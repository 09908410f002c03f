"""What the code of a module reads beside its tensors: names, globals and attributes of classes.

A plan runs a copy of the modules, and compiled code has the values of constants built in. So a constant that
the code of a model reads has to be watched wherever it lives: on the module, on its class, or among the
globals of the file that the code is in. Code is followed from a class's methods into the functions that they
name, or that a module holds, as far as these are the user's own or of the library that the class is of.
"""

from __future__ import annotations

import dis
import functools
import sys
import sysconfig
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

_SCALARS = (bool, int, float, str, type(None))
#: Methods that no call runs.
_NO_CALL = ("__init__", "extra_repr", "reset_parameters", "__repr__")
_INSTALLED = ("site-packages", "dist-packages")
#: Functions and attributes by which code reads a global that it does not name, or names in a string.
_BY_NAME = frozenset(("globals", "vars", "eval", "exec", "sys", "importlib", "import_module", "__import__"))
_OF_FRAMES = frozenset(("__globals__", "f_globals", "import_module"))
#: What `torch.nn.Module` keeps in a module's dictionary.
_SLOTS = frozenset(vars(torch.nn.Module()))
_CALLABLE = (types.FunctionType, staticmethod, classmethod)
_NO_SETTINGS = (torch.nn.Module, torch.Tensor, type, types.FunctionType)
#: More decorators than any function has.
_DECORATORS = 8


@dataclass(frozen=True)
class Reading:
    """What a class's code reads.

    ``names`` are those that its methods and properties and the functions that its forward calls mention,
    ``in_calls`` those of them that the forward and what it calls do; ``assigned`` are attributes that a call
    may assign, ``assigned_globals`` globals that it may. ``on_classes`` and ``in_globals`` are the names of
    constants that a call reads there.
    """

    names: frozenset[str]
    in_calls: frozenset[str]
    assigned: frozenset[str]
    on_classes: tuple[tuple[weakref.ref[type], frozenset[str]], ...]
    in_globals: tuple[tuple[dict[str, Any], frozenset[str]], ...]
    assigned_globals: tuple[tuple[dict[str, Any], frozenset[str]], ...] = ()

    def constants(self) -> Iterator[tuple[int, Mapping[str, Any], frozenset[str]]]:
        """Dictionaries by the id of their owner, each with the names that a call reads in it."""
        for reference, names in self.on_classes:
            cls = reference()
            if cls is not None:
                yield id(cls), vars(cls), names
        for space, names in self.in_globals:
            yield id(space), space, names


_known: weakref.WeakKeyDictionary[type, Reading] = weakref.WeakKeyDictionary()


def reading_of(cls: type) -> Reading:
    """What the code of ``cls`` reads, its bases up to `torch.nn.Module` included."""
    found = _known.get(cls)
    if found is None:
        found = _known[cls] = _read(cls)
    return found


def readings(modules: Iterable[torch.nn.Module]) -> Iterator[Reading]:
    """What the code of ``modules`` reads, and that of functions which they hold as attributes."""
    modules = list(modules)
    yield from map(reading_of, dict.fromkeys(map(type, modules)))
    held = {(function, type(module).__module__) for module in modules for function in _held(module)}
    for function, of in held:
        called = _called([function], of, {})
        names = _union(names_in(each.__code__) for each in called)
        assigned = _union(_stored(each.__code__, "STORE_ATTR") for each in called)
        yield Reading(names, names, assigned, (), *_globals_of(called, of))


def constants_read(
    modules: Iterable[torch.nn.Module],
) -> list[tuple[int, Mapping[str, Any], list[str]]]:
    """Dictionaries beside the modules, by the id of their owner, with the constants there that code reads."""
    modules = list(modules)
    found: dict[int, tuple[Mapping[str, Any], set[str]]] = {}
    constants = [entry for reading in readings(modules) for entry in reading.constants()]
    for module in modules:
        names = reading_of(type(module)).in_calls
        for value in _attributes(module):
            if isinstance(value, types.ModuleType) and is_own(value.__name__, type(module).__module__):
                constants.append((id(vars(value)), vars(value), _constants(vars(value), names)))
    for owner, space, names in constants:
        found.setdefault(owner, (space, set()))[1].update(name for name in names if name in space)
    return [(owner, space, sorted(names)) for owner, (space, names) in found.items() if names]


def assigned_globals(modules: Iterable[torch.nn.Module]) -> list[tuple[Mapping[str, Any], frozenset[str]]]:
    """Dictionaries of globals, each with the names that a call of ``modules`` may assign there."""
    found: dict[int, tuple[Mapping[str, Any], frozenset[str]]] = {}
    for reading in readings(modules):
        for space, names in reading.assigned_globals:
            found[id(space)] = (space, found.get(id(space), (space, frozenset[str]()))[1] | names)
    return list(found.values())


def _attributes(module: torch.nn.Module) -> Iterator[Any]:
    """What a module holds beside what every module does; of lists and dictionaries the items."""
    for name, value in vars(module).items():
        if name not in _SLOTS:
            kind = type(value)
            yield from value if kind in (list, tuple) else value.values() if kind is dict else (value,)


def _held(module: torch.nn.Module) -> Iterator[types.FunctionType]:
    """The user's own functions among the attributes of ``module``, and those in a partial call."""
    for value in _attributes(module):
        while isinstance(value, functools.partial):
            value = value.func
        yield from (f for f in _functions(value) if is_own(f.__module__, type(module).__module__))


def _read(cls: type) -> Reading:
    bases = list(own_bases(cls))
    methods: dict[str, list[types.FunctionType]] = {}
    for base in bases:
        for name, value in vars(base).items():
            if name not in _NO_CALL:
                methods.setdefault(name, []).extend(_functions(value))
    of = cls.__module__
    called = _called(methods.get("forward", []), of, {} if _is_torchs(of) else methods)
    everything = {*called, *(function for named in methods.values() for function in named)}
    read = _union(names_in(function.__code__) for function in called)
    assigned = _union(_stored(function.__code__, "STORE_ATTR") for function in called)
    on_classes = (
        (weakref.ref(base), _constants(vars(base), read) - assigned)
        for base in bases
        if not _is_torchs(base.__module__)
    )
    return Reading(
        _union(names_in(function.__code__) for function in everything),
        read,
        assigned,
        tuple(entry for entry in on_classes if entry[1]),
        *_globals_of(called, of),
    )


def _globals_of(called: Iterable[types.FunctionType], of: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Dictionaries with the names of constants that the functions read there, and with those they assign.

    Where one of them reads globals by name, the names are those that any of them mentions.
    """
    functions = [function for function in called if not _is_torchs(function.__module__)]
    by_name = any(_reads_by_name(function.__code__, of) for function in functions)
    mentioned = _union(names_in(function.__code__) for function in functions)
    spaces: dict[int, tuple[dict[str, Any], set[str]]] = {}
    for function in functions:
        code, space = function.__code__, function.__globals__
        globally, names = (mentioned, mentioned) if by_name else (_globals_in(code), names_in(code))
        constants = _constants(space, globally) - _stored(code, "STORE_GLOBAL")
        spaces.setdefault(id(space), (space, set()))[1].update(constants)
        for place in _dictionaries(space, globally, of):
            spaces.setdefault(id(place), (place, set()))[1].update(_constants(place, names))
    read = tuple((space, frozenset(names)) for space, names in spaces.values() if names)
    stored = ((f.__globals__, _stored(f.__code__, "STORE_GLOBAL")) for f in functions)
    return read, tuple(entry for entry in stored if entry[1])


def _dictionaries(space: Mapping[str, Any], names: Iterable[str], of: str) -> Iterator[dict[str, Any]]:
    """Those of the user's own modules and objects (of settings) among the globals called ``names``."""
    for value in (space[name] for name in names if name in space):
        if isinstance(value, types.ModuleType):
            own = is_own(value.__name__, of)
        else:
            own = not isinstance(value, _NO_SETTINGS) and (
                type(value) is types.SimpleNamespace or is_own(type(value).__module__, of)
            )
        if own and isinstance(getattr(value, "__dict__", None), dict):
            yield value.__dict__


def is_plain(value: Any) -> bool:
    """Whether ``value`` is a constant, or a short list, tuple or dictionary of constants."""
    if isinstance(value, _SCALARS):
        return True
    if type(value) is dict:
        return len(value) <= 16 and all(isinstance(item, _SCALARS) for item in value.values())
    if type(value) in (list, tuple):
        return len(value) <= 16 and all(isinstance(item, _SCALARS) for item in value)
    return False


def _union(sets: Iterable[frozenset[str]]) -> frozenset[str]:
    return frozenset[str]().union(*sets)


@functools.lru_cache(maxsize=4096)
def names_in(code: types.CodeType) -> frozenset[str]:
    """The names and strings that ``code`` and the functions inside it mention."""
    strings = (constant for constant in code.co_consts if isinstance(constant, str))
    return frozenset({*code.co_names, *strings}).union(*map(names_in, _inner(code)))


@functools.lru_cache(maxsize=4096)
def _operations(code: types.CodeType) -> frozenset[tuple[str, str]]:
    """The instructions of ``code`` and the functions inside it that have a name, with that name."""
    own = ((i.opname, i.argval) for i in dis.get_instructions(code) if isinstance(i.argval, str))
    return frozenset(own).union(*map(_operations, _inner(code)))


def _globals_in(code: types.CodeType) -> frozenset[str]:
    """The names that ``code`` reads as globals: those of attributes are others."""
    return frozenset(name for kind, name in _operations(code) if kind == "LOAD_NAME" or "GLOBAL" in kind)


def _reads_by_name(code: types.CodeType, of: str) -> bool:
    """Whether ``code`` asks for a dictionary of globals, or imports one of the user's own modules."""
    imported = (name for kind, name in _operations(code) if kind == "IMPORT_NAME")
    attributes = (name for kind, name in _operations(code) if kind in ("LOAD_ATTR", "LOAD_METHOD"))
    return (
        not _BY_NAME.isdisjoint(_globals_in(code))
        or not _OF_FRAMES.isdisjoint(attributes)
        or any(not name or is_own(name, of) for name in imported)
    )


def _stored(code: types.CodeType, operation: str) -> frozenset[str]:
    """The names that ``code`` assigns by instructions called ``operation``."""
    return frozenset(name for kind, name in _operations(code) if kind == operation)


def _inner(code: types.CodeType) -> Iterator[types.CodeType]:
    return (constant for constant in code.co_consts if isinstance(constant, types.CodeType))


def _constants(space: Mapping[str, Any], names: Iterable[str]) -> frozenset[str]:
    """The ``names`` of constants in ``space``."""
    return frozenset(n for n in names if n in space and is_plain(space[n]) and not n.startswith("__"))


def own_bases(cls: type) -> Iterator[type]:
    """``cls`` and its bases up to `torch.nn.Module`."""
    for base in cls.__mro__:
        if base is torch.nn.Module or base is object:
            return
        yield base


def _functions(value: Any) -> Iterator[types.FunctionType]:
    """The plain function that ``value`` is or wraps, and each decorator that says what it wraps."""
    value = value.fget if isinstance(value, property) else value
    for _ in range(_DECORATORS):
        if isinstance(value, types.FunctionType):
            yield value
        value = getattr(value, "__wrapped__", None) if isinstance(value, _CALLABLE) else None


def _called(
    functions: Iterable[types.FunctionType], of: str, methods: Mapping[str, list[types.FunctionType]]
) -> set[types.FunctionType]:
    """``functions``, and those that they name among their globals or ``methods``."""
    seen: set[types.FunctionType] = set()
    pending = list(functions)
    while pending:
        function = pending.pop()
        if function in seen:
            continue
        seen.add(function)
        code, mentioned = function.__code__, names_in(function.__code__)
        pending += [method for name in mentioned for method in methods.get(name, ())]
        for name in mentioned if _reads_by_name(code, of) else _globals_in(code):
            for called in _functions(function.__globals__.get(name)):
                if is_own(called.__module__, of):
                    pending.append(called)
    return seen


def _is_torchs(module: str | None) -> bool:
    return (module or "").partition(".")[0] == "torch"


@functools.lru_cache(maxsize=4096)
def is_own(module: str | None, of: str) -> bool:
    """Whether ``module`` belongs to the package of the module ``of``, or is no installed library's."""
    package = (module or "").partition(".")[0]
    if not package or package in ("torch", "kpt"):
        return False
    if package == of.partition(".")[0]:
        return True
    file = getattr(sys.modules.get(package), "__file__", None)
    if file is None:
        return package == "__main__"
    installed = any(folder in file for folder in _INSTALLED)
    return not installed and not file.startswith(sysconfig.get_paths()["stdlib"])
