"""A model's state before a trial: compared bit for bit afterwards, and put back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch

from kpt.judge.calls import clone_tensor
from kpt.judge.outputs import CHUNK, bits, bitwise_equal

_CONTAINERS = (list, dict, set, OrderedDict)
#: What has attributes and is no object in the sense of `_ObjectState`.
_NO_OBJECTS = (torch.nn.Module, torch.Tensor, type, FunctionType, MethodType, ModuleType, partial)
#: Objects inside objects are looked at so far down: a configuration's own configurations.
_DEPTH = 1
_SLOTS = ("_parameters", "_buffers", "_modules")
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


@dataclass
class _TensorState:
    """One tensor: an alias of its memory, its metadata, and its bits (or their checksum)."""

    name: str
    tensor: torch.Tensor
    alias: torch.Tensor
    copy: torch.Tensor | None
    checksum: int
    requires_grad: bool
    is_leaf: bool
    grad: torch.Tensor | None
    grad_copy: torch.Tensor | None
    grad_checksum: int
    #: The tensor's dictionaries of hooks with what was in them.
    hooks: dict[str, tuple[Any, dict[Any, Any]]]


@dataclass
class _ModuleState:
    path: str
    module: torch.nn.Module
    slots: dict[str, dict[str, Any]]
    attributes: dict[str, Any]
    contents: dict[str, Any]


@dataclass
class _ObjectState:
    """An object that hangs on a module, a configuration say: it is shared with every copy of the module."""

    path: str
    value: Any
    attributes: dict[str, Any]
    contents: dict[str, Any]


class ModelState:
    """What a model was: tensors with their bits, gradients, flags, attributes and hooks of every module,
    and the attributes of objects that hang on one.

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
        copied = _within(list(found.values()), limit_bytes)
        #: Names of the tensors that are kept by checksum only.
        self.unrestorable: list[str] = [name for name, tensor in found.values() if id(tensor) not in copied]
        self._tensors = [_tensor_state(name, tensor, id(tensor) in copied) for name, tensor in found.values()]

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
            found += [f"{kept.path}: {change}" for change in _attribute_differences(kept, vars(kept.value))]
        known = {state.path for state in self._modules}
        found += [f"{path}: added" for path in now if path not in known]
        return found + self.tensor_differences()

    def tensor_differences(self) -> list[str]:
        """What differs of the tensors alone: where a plan is installed, modules differ on purpose."""
        return [f"{kept.name}: {change}" for kept in self._tensors for change in _tensor_differences(kept)]

    def restore(self) -> list[str]:
        """Put everything back; return what could not be, as `differences` names it."""
        for state in self._modules:
            _restore_module(state)
        for held in self._objects:
            _restore_attributes(held, vars(held.value))
        self.restore_tensors()
        return self.differences()

    def restore_tensors(self) -> list[str]:
        """Put the tensors back; return what could not be."""
        for kept in self._tensors:
            _restore_tensor(kept)
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
        for name, value in state.attributes.items()
    ]
    for path, value, depth in pending:
        if id(value) in seen or not _is_object(value):
            continue
        seen.add(id(value))
        attributes = dict(vars(value))
        copies = {name: item.copy() for name, item in attributes.items() if isinstance(item, _CONTAINERS)}
        yield _ObjectState(path, value, attributes, copies)
        if depth < _DEPTH:
            pending += [(f"{path}.{name}", item, depth + 1) for name, item in attributes.items()]


def shared_objects(model: torch.nn.Module) -> list[Any]:
    """The objects with attributes that the modules of ``model`` hold, and all structural copies with it."""
    modules = [_module_state(path, module) for path, module in model.named_modules()]
    return [kept.value for kept in _objects(modules)]


def _is_object(value: Any) -> bool:
    return not isinstance(value, _NO_OBJECTS) and isinstance(getattr(value, "__dict__", None), dict)


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


def _size(tensor: torch.Tensor) -> int:
    if not _has_bits(tensor):
        return 0
    total = tensor.numel() * tensor.element_size()
    return total * 2 if tensor.is_leaf and tensor.grad is not None else total


def _has_bits(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "meta" and not isinstance(
        tensor, torch.nn.parameter.UninitializedTensorMixin
    )


def _within(named: list[tuple[str, torch.Tensor]], limit_bytes: int | None) -> set[int]:
    """Ids of the tensors that are copied: the smallest first, as far as the limit goes."""
    copied, total = set(), 0
    for _, tensor in sorted(named, key=lambda item: _size(item[1])):
        total += _size(tensor)
        if limit_bytes is not None and total > limit_bytes:
            break
        copied.add(id(tensor))
    return copied


def _tensor_state(name: str, tensor: torch.Tensor, copied: bool) -> _TensorState:
    present = _has_bits(tensor)
    grad = tensor.grad if tensor.is_leaf and present else None
    return _TensorState(
        name=name,
        tensor=tensor,
        alias=tensor.detach() if present else tensor,
        copy=clone_tensor(tensor.detach()) if copied and present else None,
        checksum=checksum(tensor) if present and not copied else 0,
        requires_grad=tensor.requires_grad,
        is_leaf=tensor.is_leaf,
        grad=grad,
        grad_copy=clone_tensor(grad.detach()) if grad is not None and copied else None,
        grad_checksum=checksum(grad) if grad is not None and not copied else 0,
        hooks={name: _hooks(tensor, name) for name in _TENSOR_HOOKS} if present else {},
    )


def _hooks(tensor: torch.Tensor, name: str) -> tuple[Any, dict[Any, Any]]:
    table = getattr(tensor, name, None)
    return table, dict(table or {})


def checksum(tensor: torch.Tensor) -> int:
    """A position-dependent hash of the bits, computed on the tensor's device in bounded memory."""
    detached = tensor.detach()
    if detached.layout is not torch.strided:
        detached = detached.to_dense()
    flat = bits(detached.int_repr() if detached.is_quantized else detached).reshape(-1)
    total = 0
    for start in range(0, flat.numel(), CHUNK):
        piece = flat[start : start + CHUNK].to(torch.int64)
        weights = torch.arange(1, piece.numel() + 1, device=piece.device)
        # Odd multipliers make every bit of every element count; integer sums wrap exactly.
        mixed = int(((piece ^ (piece >> 17)) * (2 * weights + 1) + piece * 0x9E3779B1).sum())
        total = (total * 1_000_003 + mixed) & 0xFFFFFFFFFFFFFFFF
    return total


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
    now = {name: value for name, value in values.items() if name not in _SLOTS}
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


def _tensor_differences(state: _TensorState) -> Iterator[str]:
    tensor = state.tensor
    if not _has_bits(tensor) or not _has_bits(state.alias):
        if _has_bits(tensor) != _has_bits(state.alias):
            yield "materialised" if _has_bits(tensor) else "released"
        return
    if _moved(state):
        yield "memory, dtype, shape or strides"
    elif not _unchanged(tensor, state.copy, state.checksum):
        yield "values"
    if tensor.requires_grad != state.requires_grad:
        yield "requires_grad"
    if any(_hooks(tensor, name)[1] != before for name, (_, before) in state.hooks.items()):
        yield "hooks"
    if not (state.is_leaf and tensor.is_leaf):
        return
    if tensor.grad is not state.grad:
        had, has = state.grad is not None, tensor.grad is not None
        yield "gradient " + ("replaced" if had and has else "removed" if had else "added")
    elif state.grad is not None and not _unchanged(state.grad, state.grad_copy, state.grad_checksum):
        yield "gradient values"


def _unchanged(tensor: torch.Tensor, copy: torch.Tensor | None, expected: int) -> bool:
    return bitwise_equal(tensor, copy) if copy is not None else checksum(tensor) == expected


def _moved(state: _TensorState) -> bool:
    tensor, alias = state.tensor, state.alias
    if tensor.dtype != alias.dtype or tensor.shape != alias.shape or tensor.device != alias.device:
        return True
    if tensor.layout is not torch.strided or type(tensor.detach()) is not torch.Tensor:
        return False  # subclasses keep their memory to themselves
    return tensor.stride() != alias.stride() or tensor.data_ptr() != alias.data_ptr()


def _restore_module(state: _ModuleState) -> None:
    values = vars(state.module)
    for slot in _SLOTS:
        before, now = state.slots[slot], values[slot]
        if list(before) != list(now) or any(now[name] is not before[name] for name in before):
            now.clear()
            now.update(before)
    _restore_attributes(state, values)


def _restore_attributes(state: _ModuleState | _ObjectState, values: dict[str, Any]) -> None:
    for name in [name for name in values if name not in _SLOTS and name not in state.attributes]:
        del values[name]
    for name, before in state.attributes.items():
        if values.get(name, state) is not before:
            values[name] = before
        if name in state.contents and not _same_contents(state.contents[name], before):
            _refill(before, state.contents[name])


def _refill(container: Any, contents: Any) -> None:
    container.clear()
    container.extend(contents) if isinstance(container, list) else container.update(contents)


def _restore_tensor(state: _TensorState) -> None:
    tensor = state.tensor
    if not _has_bits(tensor) and not _has_bits(state.alias):
        return
    if _moved(state):
        tensor.data = state.alias
    # Writing through an alias made by `.data` leaves the version counter alone, for those who watch it.
    if state.copy is not None and not bitwise_equal(tensor, state.copy):
        _copy_bits(tensor.data, state.copy)
    if tensor.is_leaf and tensor.requires_grad != state.requires_grad:
        tensor.requires_grad_(state.requires_grad)
    for name, (table, before) in state.hooks.items():
        if _hooks(tensor, name)[1] != before:
            added = getattr(tensor, name, None)
            if added is not None:
                added.clear()  # torch may go on reading it after it was taken away
            if table is not None:
                table.clear()
                table.update(before)
            setattr(tensor, name, table)
    if state.is_leaf and tensor.is_leaf:
        if tensor.grad is not state.grad:
            tensor.grad = state.grad
        if (
            state.grad is not None
            and state.grad_copy is not None
            and not bitwise_equal(state.grad, state.grad_copy)
        ):
            _copy_bits(state.grad.data, state.grad_copy)


def _copy_bits(target: torch.Tensor, source: torch.Tensor) -> None:
    if target.layout is not torch.strided or target.is_quantized or target.is_complex():
        target.copy_(source)
    else:
        bits(target).copy_(bits(source))
