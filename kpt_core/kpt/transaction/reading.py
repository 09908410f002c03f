"""What the code of a module reads beside its tensors: names, globals and attributes of classes.

A plan runs a copy of the modules, and compiled code has the values of constants built in. So a constant that
the code of a model reads has to be watched wherever it lives: on the module, on its class, or among the
globals of the file that the code is in. Code is followed from a class's methods into the functions that they
name, as far as these are the user's own or of the library that the class is of.
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
#: What reads a global by a name that is no name in the code.
_DYNAMIC = frozenset(
    ("globals", "vars", "eval", "exec", "sys", "import_module", "__import__", "__globals__", "f_globals")
)
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


def constants_read(classes: Iterable[type]) -> list[tuple[int, Mapping[str, Any], list[str]]]:
    """Dictionaries beside the modules, by the id of their owner, with the constants there that code reads."""
    found: dict[int, tuple[Mapping[str, Any], set[str]]] = {}
    for cls in dict.fromkeys(classes):
        for owner, space, names in reading_of(cls).constants():
            found.setdefault(owner, (space, set()))[1].update(name for name in names if name in space)
    return [(owner, space, sorted(names)) for owner, (space, names) in found.items() if names]


def assigned_globals(classes: Iterable[type]) -> list[tuple[Mapping[str, Any], frozenset[str]]]:
    """Dictionaries of globals, each with the names that a call of modules of ``classes`` may assign there."""
    found: dict[int, tuple[Mapping[str, Any], frozenset[str]]] = {}
    for cls in dict.fromkeys(classes):
        for space, names in reading_of(cls).assigned_globals:
            found[id(space)] = (space, found.get(id(space), (space, frozenset[str]()))[1] | names)
    return list(found.values())


def _read(cls: type) -> Reading:
    bases = list(own_bases(cls))
    methods: dict[str, list[types.FunctionType]] = {}
    for base in bases:
        for name, value in vars(base).items():
            if name not in _NO_CALL:
                methods.setdefault(name, []).extend(_functions(value))
    called = _called(methods.get("forward", []), cls, {} if _is_torchs(cls.__module__) else methods)
    everything = {*called, *(function for named in methods.values() for function in named)}
    read = _union(names_in(function.__code__) for function in called)
    assigned = _union(_stored(function.__code__, "STORE_ATTR") for function in called)
    on_classes = (
        (weakref.ref(base), _constants(vars(base), read) - assigned)
        for base in bases
        if not _is_torchs(base.__module__)
    )
    spaces: dict[int, tuple[dict[str, Any], set[str]]] = {}
    for function in called:
        if _is_torchs(function.__module__):
            continue
        space, names, globally = (
            function.__globals__,
            names_in(function.__code__),
            _globals_in(function.__code__),
        )
        for place in (space, *_dictionaries(space, globally, cls)):
            constants = _constants(place, globally if place is space else names)
            if constants and place is space:
                constants -= _stored(function.__code__, "STORE_GLOBAL")
            spaces.setdefault(id(place), (place, set()))[1].update(constants)
    return Reading(
        _union(names_in(function.__code__) for function in everything),
        read,
        assigned,
        tuple(entry for entry in on_classes if entry[1]),
        tuple((space, frozenset(names)) for space, names in spaces.values() if names),
        tuple(
            (function.__globals__, names)
            for function in called
            if not _is_torchs(function.__module__) and (names := _stored(function.__code__, "STORE_GLOBAL"))
        ),
    )


def _dictionaries(space: Mapping[str, Any], names: Iterable[str], cls: type) -> Iterator[dict[str, Any]]:
    """Those of the user's own modules and objects (of settings) among the globals called ``names``."""
    for value in (space[name] for name in names if name in space):
        if isinstance(value, types.ModuleType):
            own = is_own(value.__name__, cls.__module__)
        else:
            own = not isinstance(value, _NO_SETTINGS) and (
                type(value) is types.SimpleNamespace or is_own(type(value).__module__, cls.__module__)
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


def names_in(code: types.CodeType) -> frozenset[str]:
    """The names and strings that ``code`` and the functions inside it mention."""
    strings = (constant for constant in code.co_consts if isinstance(constant, str))
    return frozenset({*code.co_names, *strings}).union(*map(names_in, _inner(code)))


def _globals_in(code: types.CodeType) -> frozenset[str]:
    """The names that ``code`` and the functions inside it read as globals: not those of attributes.

    All that they mention where they ask for a dictionary of globals, in which strings are names.
    """
    names = names_in(code)
    if not names.isdisjoint(_DYNAMIC):
        return names
    loads = (i for i in dis.get_instructions(code) if i.opname == "LOAD_NAME" or "GLOBAL" in i.opname)
    return frozenset(str(i.argval) for i in loads).union(*map(_globals_in, _inner(code)))


def _stored(code: types.CodeType, operation: str) -> frozenset[str]:
    """The names that ``code`` assigns by instructions called ``operation``."""
    found = (str(i.argval) for i in dis.get_instructions(code) if i.opname == operation)
    return frozenset(found).union(*(_stored(part, operation) for part in _inner(code)))


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
    functions: Iterable[types.FunctionType], cls: type, methods: Mapping[str, list[types.FunctionType]]
) -> set[types.FunctionType]:
    """``functions``, and those that they name among their globals or ``methods``."""
    seen: set[types.FunctionType] = set()
    pending = list(functions)
    while pending:
        function = pending.pop()
        if function in seen:
            continue
        seen.add(function)
        pending += [method for name in names_in(function.__code__) for method in methods.get(name, ())]
        for name in _globals_in(function.__code__):
            for called in _functions(function.__globals__.get(name)):
                if is_own(called.__module__, cls.__module__):
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
