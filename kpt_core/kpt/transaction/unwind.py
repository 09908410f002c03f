"""Take a patched forward out of whatever was put around it after the commit.

Libraries and users wrap ``model.forward`` in every way that Python has: a closure, an attribute, a list, a
default argument. What they keep is the bound method that was installed, an object that nobody else makes. So
wrappers are not read to find it: the collector is asked who holds it, and each of these gets the original in
its place.
"""

from __future__ import annotations

import functools
import gc
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

#: More objects than a wrapper around a forward leads to; beyond, nobody can say what it calls.
_MOST_OBJECTS = 1_000_000
_NEVER_ENTERED = (type, types.ModuleType, types.CodeType, types.FrameType, torch.Tensor)
#: Instances of classes written in Python, whose attributes the collector may see without a dictionary.
_MANAGED_DICT = 1 << 4

_Exchange = Callable[[], Any]


def unwind(installed: types.MethodType, replacement: Callable[..., Any], wrapper: Any = None) -> None:
    """Give everybody who holds ``installed``, or its function, the ``replacement``.

    ``wrapper`` is what is called now in place of ``installed``, if anything is.

    Raises:
        RuntimeError: the wrapper may call ``installed`` from where it cannot be exchanged. Nothing was
            changed then.
    """
    new = {id(installed): replacement, id(installed.__func__): getattr(replacement, "__func__", replacement)}
    aliases: list[Any] = [installed, installed.__func__]
    seen = {id(installed), id(aliases)}
    exchanges: list[_Exchange] = []
    fixed: list[Any] = []
    for alias in aliases:  # which grows meanwhile
        for holder in gc.get_referrers(alias):
            if id(holder) in seen or isinstance(holder, types.FrameType):
                continue
            seen.add(id(holder))
            if isinstance(holder, types.MethodType) and holder.__func__ is installed.__func__:
                new[id(holder)] = replacement
                aliases.append(holder)
            elif exchange := _exchange(holder, new):
                exchanges.append(exchange)
            else:
                fixed.append(holder)
    if fixed and wrapper is not None and _reaches(wrapper, set(map(id, fixed))):
        name, kind = getattr(wrapper, "__qualname__", type(wrapper).__name__), type(fixed[0]).__name__
        raise RuntimeError(
            f"{name} wraps the optimised forward and cannot be unwound, since an object of type {kind} holds "
            "that; remove the wrapper, then call kpt.restore(model) again"
        )
    for exchange in exchanges:
        exchange()


def _exchange(holder: Any, new: dict[int, Any]) -> _Exchange | None:
    """What puts the new objects (by the ids of the old) into ``holder``; None where nothing can."""
    if isinstance(holder, types.CellType):
        return functools.partial(_put_in_cell, holder, new)
    if isinstance(holder, dict):
        return _in_dictionary(holder, new)
    if isinstance(holder, list):
        return functools.partial(_put_in_list, holder, new)
    if type(holder) is functools.partial:
        return functools.partial(_put_in_partial, holder, new)
    if type(holder) is tuple:
        for owner in gc.get_referrers(holder):
            if isinstance(owner, types.FunctionType) and owner.__defaults__ is holder:
                return functools.partial(_put_in_defaults, owner, new)
            if type(owner) is functools.partial and owner.args is holder:
                return functools.partial(_put_in_partial, owner, new)
        return None
    if type(holder).__flags__ & _MANAGED_DICT and _only_attributes(holder, new):
        return _in_dictionary(holder.__dict__, new)
    return None


def _put_in_cell(cell: types.CellType, new: dict[int, Any]) -> None:
    cell.cell_contents = new.get(id(cell.cell_contents), cell.cell_contents)


def _put_in_list(holder: list[Any], new: dict[int, Any]) -> None:
    for index, item in enumerate(holder):
        if id(item) in new:
            list.__setitem__(holder, index, new[id(item)])


def _put_in_partial(holder: functools.partial[Any], new: dict[int, Any]) -> None:
    state: Any = holder.__reduce__()[2]
    function, args, kwargs, attributes = state
    kwargs = {name: new.get(id(value), value) for name, value in kwargs.items()}
    args = tuple(new.get(id(value), value) for value in args)
    holder.__setstate__((new.get(id(function), function), args, kwargs, attributes))  # type: ignore[attr-defined]


def _put_in_defaults(function: types.FunctionType, new: dict[int, Any]) -> None:
    function.__defaults__ = tuple(new.get(id(value), value) for value in function.__defaults__ or ())


def _in_dictionary(holder: dict[Any, Any], new: dict[int, Any]) -> _Exchange | None:
    keys = [key for key, value in holder.items() if id(value) in new]
    if not keys or any(id(key) in new for key in holder):
        return None
    owner: Any = None
    if "__module__" in holder and "__doc__" in holder:  # a class's own, which is written to through the class
        owners = (cls for cls in gc.get_referrers(holder) if isinstance(cls, type))
        owner = next((cls for cls in owners if all(vars(cls).get(k) is holder[k] for k in keys)), None)

    def put() -> None:
        for key in keys:
            value = new[id(holder[key])]
            dict.__setitem__(holder, key, value) if owner is None else setattr(owner, key, value)

    return put


def _only_attributes(holder: Any, new: dict[int, Any]) -> bool:
    """Whether ``holder`` keeps the old objects among its attributes and nowhere else (in slots, say)."""
    inside = sum(id(value) in new for value in holder.__dict__.values())
    return 0 < inside >= sum(id(value) in new for value in gc.get_referents(holder))


def _reaches(wrapper: Any, holders: set[int]) -> bool:
    """Whether a call of ``wrapper`` may come to one of ``holders``, as far as objects and names lead."""
    seen: dict[Any, Any] = {}  # which keeps alive whatever has its id here
    pending = [wrapper]
    while pending:
        item = pending.pop()
        if id(item) in holders:
            return True
        if type(item) in weakref.ProxyTypes:  # which answers for another object, or raises
            continue
        method = isinstance(item, types.MethodType)
        key = (id(item.__func__), id(item.__self__)) if method else id(item)
        if key in seen or isinstance(item, _NEVER_ENTERED) or _is_ours(item):
            continue
        seen[key] = item
        if len(seen) > _MOST_OBJECTS:
            return True
        pending.extend(_leads_to(item))
    return False


def _is_ours(item: Any) -> bool:
    return type(item).__module__.partition(".")[0] == "kpt"


def _leads_to(item: Any) -> Iterator[Any]:
    if isinstance(item, types.FunctionType):
        yield from item.__closure__ or ()
        yield from (item.__defaults__, item.__kwdefaults__, item.__dict__)
        names = _named(item.__code__)
        for name in names & item.__globals__.keys():
            value = item.__globals__[name]
            yield value
            if isinstance(value, (type, types.ModuleType)):
                yield from (vars(value)[inner] for inner in names & vars(value).keys())
        return
    if isinstance(item, types.MethodType):
        yield from (item.__func__, item.__self__)
        if isinstance(item.__func__, types.FunctionType):
            for name in _named(item.__func__.__code__):
                yield from _of_class(item.__self__, name)
        return
    yield from gc.get_referents(item)
    yield from _of_class(item, "__call__")


def _of_class(owner: Any, name: str) -> Iterator[Any]:
    """The code that ``owner`` has by this name from its class, bound to it."""
    found = next((vars(base)[name] for base in type(owner).__mro__ if name in vars(base)), None)
    function = getattr(found, "fget", None) or getattr(found, "__func__", None) or found
    if isinstance(function, types.FunctionType):
        yield types.MethodType(function, owner)
    elif found is not None:
        yield found


def _named(code: types.CodeType) -> set[str]:
    """The globals and attributes that ``code`` and the functions inside it name."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(_named, inner))
