"""Notices that a submodule computes something else: another forward, class, children or tensors.

An instance attribute leaves no trace that could be compared within a microsecond for hundreds of modules.
But ``module.forward = other`` passes through ``nn.Module.__setattr__``, which asks the module's parameters,
children and buffers for the name first. Nearly every module has one of these dictionaries empty. In its
place stands an equal one, an `Ear`, that notes when it is asked for a name that matters; the next call then
compares everything once. Calls without such a write pay nothing. A dictionary that holds parameters or
buffers is replaced by a `Store`, which hears a tensor being exchanged past the module's interface, as
`torch.func.functional_call` and loaders of weights do it.

Other attributes are heard in the same way, whether it is the module's own code that reads them or a function
that is given the module.

Unnoticed are writes that do not pass there: into a module's ``__dict__`` or ``_modules``, or to an
attribute of a class. They are found when everything is compared for another reason: a switch of the mode,
or `kpt.report`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from kpt.judge.slots import slot_names, slots_of
from kpt.transaction.copies import HANDLE, REDUCE
from kpt.transaction.hooks import computed
from kpt.transaction.reading import names_read, reading_of

_MISSING = object()
#: Attributes that kpt itself sets on an optimised model.
OURS = ("forward", "_apply", HANDLE, REDUCE)
#: Names whose assignment may change what a module computes, beside those of its plain attributes.
#: ``training`` brings an occasional look at everything, whoever wrote it past the ear.
_NAMES = frozenset({"forward", "__class__", "_modules", "training"})
#: In this order: a leaf's parameters are found without its children being asked, and a container's
#: children are asked for last.
_STORES = ("_modules", "_buffers", "_parameters")
_FACTS = ("the class", "the forward", "the forward", "a child", "a parameter or buffer")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, tuple, frozenset)
#: What `nn.Module` and kpt keep in a module's dictionary; ``training`` is the mode, watched apart.
NOT_ATTRIBUTES = frozenset({*vars(torch.nn.Module()), *OURS, "forward", "training"})
_CONTAINERS = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential)


class Ear(dict):  # type: ignore[type-arg]
    """An empty dictionary of a module that hears which names it is asked for. Copies are plain.

    ``names`` are those that matter. Reading an attribute that a module has does not ask here, assigning or
    deleting it does.
    """

    listener: Structure | None = None
    names: frozenset[str] = _NAMES

    def __contains__(self, name: object) -> bool:
        if name in self.names and self.listener is not None:
            self.listener.unsure = True
        return super().__contains__(name)

    def __reduce__(self) -> Any:
        return dict, (dict(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[Any, Any]:
        import copy

        return copy.deepcopy(dict(self), memo)

    def copy(self) -> dict[Any, Any]:
        return dict(self)


class Store(dict):  # type: ignore[type-arg]
    """A module's parameters or buffers, which hears one being exchanged or removed. Copies are plain."""

    listener: Structure | None = None

    def __setitem__(self, name: Any, value: Any) -> None:
        if self.listener is not None:
            self.listener.unsure = True
        super().__setitem__(name, value)

    def __delitem__(self, name: Any) -> None:
        if self.listener is not None:
            self.listener.unsure = True
        super().__delitem__(name)

    __reduce__ = Ear.__reduce__
    __deepcopy__ = Ear.__deepcopy__
    copy = Ear.copy


class Structure:
    """The forwards, classes, children and tensors below ``model`` as they were at construction.

    ``unsure`` says that they may have changed; `changed` compares. ``names`` maps the id of a module to
    its path.
    """

    def __init__(self, model: torch.nn.Module, names: dict[int, str]) -> None:
        self._names = names
        self._root = model
        self._modules = list(dict.fromkeys(model.modules()))
        self._undo: list[Callable[[], None]] = []
        for module in self._modules:
            self._listen(module)
            self._listen_to_tensors(module)
        containers = [m for m in self._modules if isinstance(m, _CONTAINERS)]
        self._children = [m._modules for m in containers if m._modules]
        self._lengths = list(map(len, self._children))
        self.containers = len(self._children)
        self._known = [self._facts(module) for module in self._modules]
        self._attributes = [_attributes(module) for module in self._modules]
        self._unset = {id(module): _unset(module) for module in self._modules}
        # What is compared by its id has to stay alive, lest another object gets that id.
        self._alive = [(*module._parameters.values(), *module._buffers.values()) for module in self._modules]
        self.unsure = False

    def resized(self) -> bool:
        """Whether a list or dictionary of modules has other than its number of children: theirs is the
        only interface that adds or removes some without a notice."""
        return list(map(len, self._children)) != self._lengths

    def changed(self) -> str | None:
        """What differs from construction, or None; then nothing is unsure any more."""
        self.unsure = False
        for module, known, attributes in zip(self._modules, self._known, self._attributes):
            now = self._facts(module)
            for what, old, new in zip(_FACTS, known, now):
                if old is not new and old != new:
                    self.unsure = True  # it may be put back
                    return f"{what} of {self._names[id(module)] or 'the model'} was replaced"
            held = _attributes(module) if attributes else {}
            for name, value in attributes.items():
                if not _same(held.get(name, _MISSING), value):
                    self.unsure = True
                    return f"the attribute {name!r} of {self._names[id(module)] or 'the model'} changed"
            for name in module.__dict__.keys() - attributes.keys() - NOT_ATTRIBUTES:
                if name in self._unset[id(module)]:
                    self.unsure = True
                    return f"the attribute {name!r} of {self._names[id(module)] or 'the model'} was set"
        return None

    def close(self) -> None:
        for undo in self._undo:
            undo()
        self._undo.clear()

    def _facts(self, module: torch.nn.Module) -> tuple[Any, ...]:
        # The root's own forward is the dispatcher; who replaces that does not call the plan.
        own = None if module is self._root else module.__dict__.get("forward")
        children = tuple(map(id, module._modules.values()))
        tensors = (*map(id, module._parameters.values()), *map(id, module._buffers.values()))
        return type(module), own, type(module).forward, children, tensors

    def _listen(self, module: torch.nn.Module) -> None:
        for store in _STORES:
            original = module.__dict__.get(store)
            if type(original) in (dict, Ear) and not original:
                ear = Ear()
                ear.listener = self
                ear.names = _names(tuple(_attributes(module))) | _unset(module)
                module.__dict__[store] = ear
                self._undo.append(_put_back(module, store, ear, original))
                return

    def _listen_to_tensors(self, module: torch.nn.Module) -> None:
        for name in ("_parameters", "_buffers"):
            original = module.__dict__.get(name)
            if type(original) is dict and original:
                store = Store(original)
                store.listener = self
                module.__dict__[name] = store
                self._undo.append(_put_back(module, name, store, original))


def _attributes(module: torch.nn.Module) -> dict[str, Any]:
    """What a module holds beside its parameters, buffers, children and hooks."""
    left_out = NOT_ATTRIBUTES | computed(module) if module._forward_pre_hooks else NOT_ATTRIBUTES
    held = {name: value for name, value in module.__dict__.items() if name not in left_out}
    return {**held, **slots_of(module)} if slot_names(module.__class__) else held


def _unset(module: torch.nn.Module) -> frozenset[str]:
    """Names that a call of the module reads and that it has no attribute of, unless a call may set it: those
    of its class stand in for them, or a default."""
    reading = reading_of(type(module))
    present = {*module.__dict__, *module._parameters, *module._buffers, *module._modules}
    return names_read(module) - reading.assigned - present


@functools.lru_cache(maxsize=1024)
def _names(attributes: tuple[str, ...]) -> frozenset[str]:
    """The names that an ear listens for; modules of one class share them."""
    return _NAMES.union(attributes)


def _same(now: Any, before: Any) -> bool:
    """Whether an attribute is the object that it was, or a constant that no code can tell from it."""
    if now is before:
        return True
    if type(now) is not type(before) or not isinstance(now, _PLAIN):
        return False
    if isinstance(now, tuple):
        return len(now) == len(before) and all(map(_same, now, before))
    # 0.0 and -0.0 are equal, and what is divided by them is not.
    return repr(now) == repr(before) if isinstance(now, (float, complex)) else bool(now == before)


def _put_back(module: torch.nn.Module, store: str, ear: Ear | Store, original: Any) -> Callable[[], None]:
    def undo() -> None:
        ear.listener = None
        if module.__dict__.get(store) is ear:
            module.__dict__[store] = original
            original.clear()
            original.update(ear)

    return undo
