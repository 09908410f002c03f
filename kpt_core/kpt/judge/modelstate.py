"""A model's state before a trial: compared bit for bit afterwards, and put back."""

from __future__ import annotations

import pickle
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch

from kpt.globalstate import Item, same
from kpt.judge.slots import slot_names, slots_of
from kpt.judge.tensorstate import restore_tensor, tensor_differences, tensor_state, within

_CONTAINERS = (list, dict, set, OrderedDict)
#: What has attributes and is no object in the sense of `_ObjectState`.
_NO_OBJECTS = (torch.nn.Module, torch.Tensor, type, FunctionType, MethodType, ModuleType, partial)
#: Objects inside objects are looked at so far down: a configuration's own configurations.
_DEPTH = 1
_SLOTS = ("_parameters", "_buffers", "_modules")
#: What every module has: tables of hooks, whose contents are compared, and no objects of the model.
_TABLES = frozenset(vars(torch.nn.Module()))


@dataclass
class _ModuleState:
    path: str
    module: torch.nn.Module
    slots: dict[str, dict[str, Any]]
    attributes: dict[str, Any]
    contents: dict[str, Any]


@dataclass
class _ObjectState:
    """An object that hangs on a module, a configuration say: it is shared with every copy of the module.

    ``attributes`` are those of its dictionary and its slots.
    """

    path: str
    value: Any
    attributes: dict[str, Any]
    contents: dict[str, Any]


class ModelState:
    """What a model was: tensors with their bits, gradients, flags, attributes and hooks of every module,
    the attributes of objects that hang on one, and the states of random generators that it draws from.

    Args:
        model: the model; it is only read.
        limit_bytes: the most that copies may take. Tensors beyond it, largest first, are kept by
            checksum: a change is still found, but cannot be undone (`unrestorable`).
    """

    def __init__(self, model: torch.nn.Module, *, limit_bytes: int | None = None) -> None:
        self._model = model
        self._modules = [_module_state(path, module) for path, module in model.named_modules()]
        self._objects = list(_objects(self._modules))
        found: dict[int, tuple[str, torch.Tensor]] = {}
        for name, tensor in _tensors(self._modules):
            found.setdefault(id(tensor), (name, tensor))
        self._generators = [(item, item.read()) for item in _generators(self._modules)]
        copied = within(list(found.values()), limit_bytes)
        #: Names of the tensors that are kept by checksum only.
        self.unrestorable: list[str] = [name for name, tensor in found.values() if id(tensor) not in copied]
        self._tensors = [tensor_state(name, tensor, id(tensor) in copied) for name, tensor in found.values()]

    @property
    def exact(self) -> bool:
        """Whether every tensor is kept by its bits, so that everything can be put back."""
        return not self.unrestorable

    def differences(self) -> list[str]:
        """What differs from the snapshot now, as ``path: what`` or ``tensor: what``."""
        found: list[str] = []
        now = dict(self._model.named_modules())
        for state in self._modules:
            label = state.path or "model"
            if now.get(state.path) is not state.module:
                found.append(f"{label}: replaced or removed")
            found += [f"{label}: {change}" for change in _module_differences(state)]
        for kept in self._objects:
            found += [f"{kept.path}: {c}" for c in _attribute_differences(kept, attributes_of(kept.value))]
        known = {state.path for state in self._modules}
        found += [f"{path}: added" for path in now if path not in known]
        return found + self.tensor_differences()

    def tensor_differences(self) -> list[str]:
        """What differs of tensors and generators: where a plan is installed, modules differ on purpose."""
        drawn = [
            f"{item.name}: drawn from" for item, before in self._generators if not same(item.read(), before)
        ]
        return [
            *drawn,
            *(f"{kept.name}: {change}" for kept in self._tensors for change in tensor_differences(kept)),
        ]

    def restore(self) -> list[str]:
        """Put everything back; return what could not be, as `differences` names it."""
        for state in self._modules:
            _restore_module(state)
        for held in self._objects:
            _restore_object(held)
        self.restore_tensors()
        return self.differences()

    def restore_tensors(self) -> list[str]:
        """Put the tensors and random generators back; return what could not be."""
        for item, before in self._generators:
            if not same(item.read(), before):
                item.write(before)
        for kept in self._tensors:
            restore_tensor(kept)
        return self.tensor_differences()


def _module_state(path: str, module: torch.nn.Module) -> _ModuleState:
    attributes = {name: value for name, value in vars(module).items() if name not in _SLOTS}
    return _ModuleState(
        path,
        module,
        {slot: dict(vars(module)[slot]) for slot in _SLOTS},
        attributes,
        {name: value.copy() for name, value in attributes.items() if isinstance(value, _CONTAINERS)},
    )


def _objects(modules: list[_ModuleState]) -> Iterator[_ObjectState]:
    """Objects with attributes that modules hold, and those that these hold in turn."""
    seen: set[int] = set()
    pending = [
        (f"{state.path or 'model'}.{name}", value, 0)
        for state in modules
        for name, value in {**state.attributes, **slots_of(state.module)}.items()
        if name not in _TABLES
    ]
    for path, value, depth in pending:
        if id(value) in seen or not _is_object(value):
            continue
        seen.add(id(value))
        attributes = attributes_of(value)
        copies = {name: item.copy() for name, item in attributes.items() if isinstance(item, _CONTAINERS)}
        yield _ObjectState(path, value, attributes, copies)
        if depth < _DEPTH:
            pending += [(f"{path}.{name}", item, depth + 1) for name, item in attributes.items()]


def shared_objects(model: torch.nn.Module) -> list[Any]:
    """The objects with attributes that the modules of ``model`` hold, and all structural copies with it."""
    modules = [_module_state(path, module) for path, module in model.named_modules()]
    return [kept.value for kept in _objects(modules)]


def attributes_of(value: Any) -> dict[str, Any]:
    """What an object holds in its dictionary and its slots."""
    return {**getattr(value, "__dict__", {}), **slots_of(value)}


def _is_object(value: Any) -> bool:
    if isinstance(value, _NO_OBJECTS):
        return False
    if isinstance(getattr(value, "__dict__", None), dict):
        return True
    # What Python's own classes keep in slots are remembered results, of a path's text say.
    library = type(value).__module__.partition(".")[0]
    return bool(slot_names(value.__class__)) and library not in sys.stdlib_module_names


def _tensors(modules: list[_ModuleState]) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, buffers, and tensors held as plain attributes or directly inside one."""
    for state in modules:
        prefix = f"{state.path}." if state.path else ""
        for slot in ("_parameters", "_buffers"):
            for name, tensor in state.slots[slot].items():
                if tensor is not None:
                    yield prefix + name, tensor
        for name, value in state.attributes.items():
            if isinstance(value, torch.Tensor):
                yield prefix + name, value
            elif isinstance(value, (list, tuple, dict)):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                for key, item in items:
                    if isinstance(item, torch.Tensor):
                        yield f"{prefix}{name}[{key!r}]", item


def _generators(modules: list[_ModuleState]) -> Iterator[Item]:
    """The random generators that modules hold as attributes or directly inside one: calls draw from them."""
    seen: set[int] = set()
    for state in modules:
        for name, value in {**state.attributes, **slots_of(state.module)}.items():
            path = f"{state.path or 'model'}.{name}"
            items = value.values() if isinstance(value, dict) else value
            for held in items if isinstance(value, (list, tuple, dict)) else (value,):
                item = _generator(path, held)
                if item is not None and id(held) not in seen:
                    seen.add(id(held))
                    yield item


def _generator(path: str, value: Any) -> Item | None:
    """How the state of a random generator of torch, Python or NumPy is read and put back."""
    if isinstance(value, torch.Generator):
        return Item(path, value.get_state, value.set_state)
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return Item(path, value.getstate, value.setstate)
    if type(value).__module__.partition(".")[0] == "numpy":
        numpy: Any = sys.modules["numpy"]
        if isinstance(value, numpy.random.RandomState):
            return Item(path, value.get_state, value.set_state)
        if isinstance(value, numpy.random.Generator):
            bits = value.bit_generator  # whose state may hold arrays, which compare elementwise
            return Item(
                path,
                lambda: pickle.dumps(bits.state),
                lambda state: setattr(bits, "state", pickle.loads(state)),
            )
    return None


def _module_differences(state: _ModuleState) -> Iterator[str]:
    for slot in _SLOTS:
        before, now = state.slots[slot], vars(state.module)[slot]
        for name in {**before, **now}:
            if name not in now or name not in before or now[name] is not before[name]:
                what = "added" if name not in before else "removed" if name not in now else "replaced"
                yield f"{slot[1:-1]} {name!r} {what}"
        if list(before) != list(now) and set(before) == set(now):
            yield f"order of {slot[1:]}"
    yield from _attribute_differences(state, vars(state.module))


def _attribute_differences(state: _ModuleState | _ObjectState, values: dict[str, Any]) -> Iterator[str]:
    slots = _SLOTS if isinstance(state, _ModuleState) else ()
    now = {name: value for name, value in values.items() if name not in slots}
    for name in {**state.attributes, **now}:
        change = _attribute_change(state, name, now)
        if change:
            kind = "hooks" if name.endswith("_hooks") else "attribute"
            yield f"{kind} {name!r} {change}"


def _attribute_change(state: _ModuleState | _ObjectState, name: str, now: dict[str, Any]) -> str | None:
    if name not in state.attributes:
        return "added"
    if name not in now:
        return "removed"
    before, value = state.attributes[name], now[name]
    if value is not before:
        simple = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
        if isinstance(value, simple) and type(value) is type(before) and value == before:
            return None
        return "replaced"
    if name in state.contents and not _same_contents(state.contents[name], value):
        return "changed inside"
    return None


def _same_contents(before: Any, now: Any) -> bool:
    """Whether two containers hold the same objects (or equal plain values) in the same order."""
    if len(before) != len(now):
        return False
    if isinstance(before, set):
        return {id(item) for item in before} == {id(item) for item in now} or _plainly_equal(before, now)
    pairs = zip(
        list(before.items()) if isinstance(before, dict) else [(None, item) for item in before],
        list(now.items()) if isinstance(now, dict) else [(None, item) for item in now],
        strict=True,
    )
    return all(
        (key is other or key == other) and (mine is yours or _plainly_equal(mine, yours))
        for (key, mine), (other, yours) in pairs
    )


def _plainly_equal(first: Any, second: Any) -> bool:
    plain = (bool, int, float, str, bytes, type(None), tuple, frozenset, set)
    if type(first) is not type(second) or not isinstance(first, plain):
        return False
    try:
        return bool(first == second)
    except (RuntimeError, ValueError):  # tensors inside compare elementwise
        return False


def _restore_module(state: _ModuleState) -> None:
    values = vars(state.module)
    for slot in _SLOTS:
        before, now = state.slots[slot], values[slot]
        if list(before) != list(now) or any(now[name] is not before[name] for name in before):
            now.clear()
            now.update(before)
    _restore_attributes(state, values)


def _restore_object(state: _ObjectState) -> None:
    slots = slot_names(state.value.__class__)
    if isinstance(held := getattr(state.value, "__dict__", None), dict):
        in_dictionary = {name: v for name, v in state.attributes.items() if name not in slots}
        _restore_attributes(replace(state, attributes=in_dictionary), held)
    now = slots_of(state.value)
    for name in slots:
        # Past what a frozen dataclass allows.
        if name in now and name not in state.attributes:
            object.__delattr__(state.value, name)
        elif name in state.attributes and now.get(name, state) is not state.attributes[name]:
            object.__setattr__(state.value, name, state.attributes[name])
        if name in state.contents and not _same_contents(state.contents[name], state.attributes[name]):
            _refill(state.attributes[name], state.contents[name])


def _restore_attributes(state: _ModuleState | _ObjectState, values: dict[str, Any]) -> None:
    slots = _SLOTS if isinstance(state, _ModuleState) else ()
    for name in [name for name in values if name not in slots and name not in state.attributes]:
        del values[name]
    for name, before in state.attributes.items():
        if values.get(name, state) is not before:
            values[name] = before
        if name in state.contents and not _same_contents(state.contents[name], before):
            _refill(before, state.contents[name])


def _refill(container: Any, contents: Any) -> None:
    container.clear()
    container.extend(contents) if isinstance(container, list) else container.update(contents)
