"""What the code of a module reads beside its tensors: names, globals and attributes of classes.

A plan runs a copy of the modules, and compiled code has the values of constants built in. So a constant that
the code of a model reads has to be watched wherever it lives: on the module, on its class, or among the
globals of the file that the code is in. Code is followed from a class's methods into the functions that they
name, or that a module holds, as far as these are the user's own or of the library that the class is of.
"""

from __future__ import annotations

import functools
import sys
import sysconfig
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kpt.transaction.code_names import global_names, imported, mentioned, named, reads_by_name

_SCALARS = (bool, int, float, str, type(None))
#: Methods that no call runs.
_NO_CALL = ("__init__", "extra_repr", "reset_parameters", "__repr__")
_INSTALLED = ("site-packages", "dist-packages")
#: What `torch.nn.Module` keeps in a module's dictionary.
_SLOTS = frozenset(vars(torch.nn.Module()))
_CALLABLE = (types.FunctionType, staticmethod, classmethod)
_NO_SETTINGS = (torch.nn.Module, torch.Tensor, type, types.FunctionType)
#: More decorators than any function has.
_DECORATORS = 8
#: What holds more items is data.
_FEW = 64


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
_OfClasses = weakref.WeakKeyDictionary[type, Reading]
_known_held: weakref.WeakKeyDictionary[types.FunctionType, _OfClasses] = weakref.WeakKeyDictionary()


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
    yield from (_reading_of_held(*each) for each in dict.fromkeys(e for m in modules for e in _held(m)))


def names_read(module: torch.nn.Module) -> frozenset[str]:
    """The names that a call of ``module`` mentions, functions that it holds included."""
    held = (_reading_of_held(*each).in_calls for each in _held(module))
    return reading_of(type(module)).in_calls.union(*held)


def constants_read(
    modules: Iterable[torch.nn.Module],
) -> list[tuple[int, Mapping[str, Any], list[str]]]:
    """Dictionaries beside the modules, by the id of their owner, with the constants there that code reads."""
    modules = list(modules)
    found: dict[int, tuple[Mapping[str, Any], set[str]]] = {}
    constants = [entry for reading in readings(modules) for entry in reading.constants()]
    for module in modules:
        for value in _attributes(module):
            if isinstance(value, types.ModuleType) and is_own(value.__name__, type(module).__module__):
                constants.append((id(vars(value)), vars(value), _constants(vars(value), names_read(module))))
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
    """What a module holds beside what every module does; of short lists and dictionaries the items."""
    for name, value in vars(module).items():
        if name in _SLOTS:
            continue
        if type(value) in (list, tuple, dict):
            if len(value) <= _FEW:
                yield from value.values() if type(value) is dict else value
        else:
            yield value


def _held(module: torch.nn.Module) -> Iterator[tuple[types.FunctionType, type]]:
    """The user's own functions and methods among the attributes of ``module``, and those that its code names
    in modules (of Python) which it holds, with its class."""
    cls = type(module)
    for value in _attributes(module):
        while isinstance(value, (functools.partial, types.MethodType)):
            value = value.func if isinstance(value, functools.partial) else value.__func__
        values = [value]
        if isinstance(value, types.ModuleType) and is_own(value.__name__, cls.__module__):
            values = [vars(value).get(name) for name in reading_of(cls).in_calls]
        for function in (found for each in values for found in _functions(each)):
            if is_own(function.__module__, cls.__module__):
                yield function, cls


def _reading_of_held(function: types.FunctionType, cls: type) -> Reading:
    of_classes = _known_held.setdefault(function, weakref.WeakKeyDictionary())
    found = of_classes.get(cls)
    if found is None:
        found = of_classes[cls] = _read_held(function, cls)
    return found


def _read_held(function: types.FunctionType, cls: type) -> Reading:
    called = _called([function], cls.__module__, _methods(cls))
    names = _union(mentioned(each.__code__) for each in called)
    assigned = _union(named(each.__code__, "STORE_ATTR") for each in called)
    # Its strings may be in the class that holds it.
    by_name = (
        reading_of(cls).in_calls if any(reads_by_name(each.__code__) for each in called) else frozenset()
    )
    return Reading(names, names, assigned, (), *_globals_of(called, cls.__module__, by_name))


def _methods(cls: type) -> dict[str, list[types.FunctionType]]:
    found: dict[str, list[types.FunctionType]] = {}
    for base in own_bases(cls):
        for name, value in vars(base).items():
            if name not in _NO_CALL:
                found.setdefault(name, []).extend(_functions(value))
    return found


def _read(cls: type) -> Reading:
    bases, methods = list(own_bases(cls)), _methods(cls)
    of = cls.__module__
    called = _called(methods.get("forward", []), of, {} if _is_torchs(of) else methods)
    everything = {*called, *(function for named in methods.values() for function in named)}
    read = _union(mentioned(function.__code__) for function in called)
    assigned = _union(named(function.__code__, "STORE_ATTR") for function in called)
    on_classes = (
        (weakref.ref(base), _constants(vars(base), read) - assigned)
        for base in bases
        if not _is_torchs(base.__module__)
    )
    return Reading(
        _union(mentioned(function.__code__) for function in everything),
        read,
        assigned,
        tuple(entry for entry in on_classes if entry[1]),
        *_globals_of(called, of),
    )


def _globals_of(
    called: Iterable[types.FunctionType], of: str, more: frozenset[str] = frozenset()
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Dictionaries with the names of constants that the functions read there, and with those they assign.

    Where one of them reads globals by name, the names are those that any of them mentions, and ``more``.
    """
    functions = [function for function in called if not _is_torchs(function.__module__)]
    by_name = any(reads_by_name(function.__code__) for function in functions)
    everything = more.union(*(mentioned(function.__code__) for function in functions))
    spaces: dict[int, tuple[dict[str, Any], set[str]]] = {}
    for function in functions:
        code, space = function.__code__, function.__globals__
        globally, names = (everything, everything) if by_name else (global_names(code), mentioned(code))
        constants = _constants(space, globally) - named(code, "STORE_GLOBAL")
        spaces.setdefault(id(space), (space, set()))[1].update(constants)
        modules = (vars(module) for module in imported(function) if is_own(module.__name__, of))
        for place in (*_dictionaries(space, globally, of), *modules):
            spaces.setdefault(id(place), (place, set()))[1].update(_constants(place, names))
    read = tuple((space, frozenset(names)) for space, names in spaces.values() if names)
    stored = ((f.__globals__, named(f.__code__, "STORE_GLOBAL")) for f in functions)
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
        if not isinstance(value, _CALLABLE):
            return
        value = getattr(value, "__wrapped__", None)


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
        code, space, names = function.__code__, function.__globals__, mentioned(function.__code__)
        pending += [method for name in names for method in methods.get(name, ())]
        globally = names if reads_by_name(code) else global_names(code)
        modules = [value for name in globally if isinstance(value := space.get(name), types.ModuleType)]
        places = [(space, globally), *((vars(m), names) for m in (*modules, *imported(function)))]
        for place, wanted in places:
            if place is not space and not is_own(place.get("__name__"), of):
                continue
            for called in (f for name in wanted for f in _functions(place.get(name))):
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
