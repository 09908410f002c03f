"""Copies of modules that share no state with the original, so that running them leaves no trace."""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

_HOOKS = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
_STATE = ("_parameters", "_buffers", "_modules", *_HOOKS)
_ATOMS = (
    int,
    float,
    bool,
    str,
    bytes,
    complex,
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    torch.dtype,
)


def clone(
    root: torch.nn.Module,
    tensor: Callable[[torch.Tensor, bool], torch.Tensor] | None = None,
    attribute: Callable[[Any], Any] | None = None,
) -> torch.nn.Module:
    """A structural copy of ``root`` without hooks.

    ``tensor(t, is_parameter)`` gives the copy's tensor; by default parameters are shared and
    buffers cloned. ``attribute`` maps plain attribute values. Everything else that a module holds
    is deep-copied, so that lists, caches and bound methods of the copy are its own; what refuses to
    be copied is shared.
    """
    memo: dict[int, Any] = {}
    kept: list[Any] = []  # keeps ids in ``memo`` valid
    modules = list(root.modules())
    for module in modules:
        memo[id(module)] = blank(type(module))
    for module in modules:
        for is_parameter, table in ((True, module._parameters), (False, module._buffers)):
            for value in table.values():
                if value is not None and id(value) not in memo:
                    memo[id(value)] = tensor(value, is_parameter) if tensor else _share(value, is_parameter)
    for module in modules:
        twin = memo[id(module)]
        state = twin.__dict__
        for name, value in (*module.__dict__.items(), *slots(module)):
            if name in _STATE:
                continue
            if value is None or isinstance(value, _ATOMS):
                copied = attribute(value) if attribute else value
            elif isinstance(value, tuple) and all(isinstance(item, _ATOMS) for item in value):
                copied = attribute(value) if attribute else value
            else:
                try:
                    copied = copy.deepcopy(value, memo)
                except Exception as error:  # noqa: BLE001 - locks, generators, process groups: shared, as they must be
                    kept.append(error)
                    copied = value
            if name in module.__dict__:
                state[name] = copied
            else:
                object.__setattr__(twin, name, copied)
        state["_parameters"] = {k: None if v is None else memo[id(v)] for k, v in module._parameters.items()}
        state["_buffers"] = {k: None if v is None else memo[id(v)] for k, v in module._buffers.items()}
        state["_modules"] = {k: None if v is None else memo[id(v)] for k, v in module._modules.items()}
        for name in _HOOKS:
            state[name] = OrderedDict()
    result: torch.nn.Module = memo[id(root)]
    return result


def blank(cls: Any) -> Any:
    """An instance of ``cls`` itself: a ``__new__`` of its own may make another class (torch.fx does) or ask
    for arguments."""
    try:
        return object.__new__(cls)
    except TypeError:  # laid out by a base that is not Python's
        return cls.__new__(cls)


def slots(module: torch.nn.Module) -> list[tuple[str, Any]]:
    """The attributes of ``module`` that its classes keep in slots."""
    found: list[tuple[str, Any]] = []
    for cls in type(module).__mro__:
        for name, member in vars(cls).items():
            if isinstance(member, types.MemberDescriptorType):
                try:
                    found.append((name, member.__get__(module)))
                except AttributeError:  # not set
                    continue
    return found


def _share(value: torch.Tensor, is_parameter: bool) -> torch.Tensor:
    return value if is_parameter else value.detach().clone()


def hooked(root: torch.nn.Module) -> str | None:
    """Which module inside ``root`` has a hook, a parametrisation or a forward of its own, if any."""
    for path, module in root.named_modules():
        state = module.__dict__
        where = f"{path!r}" if path else "it"
        for name in _HOOKS:
            if state.get(name):
                return f"{where} has forward or backward hooks"
        if "parametrizations" in state.get("_modules", ()):
            return f"{where} is parametrised"
        if "forward" in state:
            return f"{where} has a forward set on the instance"
    return None
