"""A workspace: a private copy of a model's structure around the user's own tensors.

Trials and committed plans live in a workspace, so that nothing a pass does reaches the user's
modules: dropping the workspace undoes it. Module objects, their dictionaries and containers are new;
parameters, buffers and every other tensor are the user's objects; the user's hooks stay behind.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from kpt.ops.clone import blank, slots
from kpt.transaction.dispatch import is_dispatcher
from kpt.transaction.hooks import is_own
from kpt.transaction.structure import OURS, Ear, Store

_HOOK_DICTS = tuple(
    name
    for name in vars(torch.nn.Module())
    if "hooks" in name and isinstance(vars(torch.nn.Module())[name], dict)
)
#: The tables of hooks that a call goes through; others, of flags, have the same numbers as keys.
CALLED_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: What a function may close over or carry that leads to a module of the model.
_LEADS_TO_MODULES = (torch.nn.Module, types.MethodType, types.FunctionType, functools.partial)
_STRUCTURE = ("_parameters", "_buffers", "_modules")
_ATOMIC = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, type, torch.Tensor)


class WorkspaceError(RuntimeError):
    """The model's structure cannot be copied; the message names the module."""


def clone(
    model: torch.nn.Module,
    tensors: dict[int, torch.Tensor] | None = None,
    *,
    hooks: Callable[[torch.nn.Module, Any], bool] = is_own,
) -> torch.nn.Module:
    """A structural copy of ``model`` that shares its tensors and carries no hooks but its library's own.

    ``tensors`` maps ``id(original)`` to a replacement for tensors that must not be shared; ``hooks`` says of
    the model and a hook whether the copy carries it.

    Raises:
        WorkspaceError: a module cannot be copied (a scripted module, say).
    """
    replaced = tensors or {}
    memo: dict[int, Any] = {}
    kept_alive: list[Any] = []
    modules = list(dict.fromkeys(model.modules()))
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            raise WorkspaceError(
                f"{type(module).__name__} is a scripted module, which has no Python forward to change"
            )
        memo[id(module)] = blank(type(module))
    copier = _Copier(memo, replaced, kept_alive)
    for module in modules:
        target = memo[id(module)]
        state = target.__dict__
        tables = (module.__dict__[name] for name in CALLED_HOOKS)
        carried = {number for table in tables for number, hook in table.items() if hooks(model, hook)}
        for name, value in module.__dict__.items():
            if name in _HOOK_DICTS:
                state[name] = OrderedDict((n, copier(item)) for n, item in value.items() if n in carried)
            elif name in _STRUCTURE:
                kind: Any = dict if type(value) in (Ear, Store) else type(value)
                state[name] = kind((key, copier(item)) for key, item in value.items())
            elif name in OURS and (name != "forward" or is_dispatcher(value)):
                continue
            else:
                state[name] = copier(value)
        for name, value in slots(module):
            object.__setattr__(target, name, copier(value))
    return memo[id(model)]


class _Copier:
    """Copies attribute values: containers anew, modules to their copies, all else shared.

    Anything that is neither a container nor refers to a module is shared, so that configuration
    objects stay live: a later edit of ``model.config`` is seen by the workspace too.
    """

    def __init__(self, memo: dict[int, Any], tensors: dict[int, torch.Tensor], kept_alive: list[Any]) -> None:
        self.memo = memo
        self.tensors = tensors
        self.kept_alive = kept_alive

    def __call__(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.tensors.get(id(value), value)
        if isinstance(value, _ATOMIC):
            return value
        found = self.memo.get(id(value))
        if found is not None:
            return found
        if isinstance(value, torch.nn.Module):
            # Reachable from an attribute but not registered below the root (a back reference or an
            # owner outside): stays the user's.
            return value
        if type(value) in (list, set):
            new = type(value)()
            self._remember(value, new)
            (new.extend if isinstance(new, list) else new.update)(self(item) for item in value)
            return new
        if type(value) in (dict, OrderedDict):
            table = type(value)()
            self._remember(value, table)
            table.update((key, self(item)) for key, item in value.items())
            return table
        if type(value) is tuple:
            return tuple(self(item) for item in value)
        if isinstance(value, types.MethodType):
            owner, function = self(value.__self__), self(value.__func__)
            same = owner is value.__self__ and function is value.__func__
            return value if same else types.MethodType(function, owner)
        if isinstance(value, functools.partial):
            return functools.partial(
                self(value.func), *map(self, value.args), **{k: self(v) for k, v in value.keywords.items()}
            )
        if isinstance(value, types.FunctionType) and value.__closure__:
            return self._function(value)
        return value

    def _remember(self, original: Any, new: Any) -> None:
        self.memo[id(original)] = new
        self.kept_alive.append(original)

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        """A closure over a module (accelerate's hooks, say) has to close over its copy."""
        self._remember(function, function)  # a function that closes over itself ends here
        cells = []
        changed = False
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:
                cells.append(cell)
                continue
            if isinstance(content, _LEADS_TO_MODULES):
                new = self(content)
                if new is not content:
                    cells.append(types.CellType(new))
                    changed = True
                    continue
            cells.append(cell)
        if not changed:
            return function
        new_function = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
        )
        new_function.__kwdefaults__ = copy.copy(function.__kwdefaults__)
        self._remember(function, new_function)
        # Tracing follows an attribute of what `torch.compile` returns, and not the closure.
        for name, value in function.__dict__.items():
            new_function.__dict__[name] = self(value) if isinstance(value, _LEADS_TO_MODULES) else value
        return new_function


def has_hooks(model: torch.nn.Module) -> bool:
    """Whether a call of some module inside ``model`` goes through hooks."""
    return any(module.__dict__[name] for module in model.modules() for name in CALLED_HOOKS)


def submodule(model: torch.nn.Module, path: str) -> torch.nn.Module:
    """The module at ``path`` ("" is the root)."""
    return model.get_submodule(path) if path else model


def cast_copy(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A workspace whose floating-point tensors are copies in ``dtype``, the plain eager cast of the model;
    see `cast_dtype` for complex ones.

    Tied tensors stay tied. Buffers are copied whatever their dtype, so that running the copy leaves
    the user's untouched.
    """
    replaced: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for store, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for tensor in store.values():
                if tensor is None or id(tensor) in replaced:
                    continue
                new = tensor.detach().to(cast_dtype(tensor, dtype), copy=True)
                if is_parameter:
                    new = torch.nn.Parameter(new, requires_grad=tensor.requires_grad)
                replaced[id(tensor)] = new
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and id(value) not in replaced:
                replaced[id(value)] = value.detach().to(cast_dtype(value, dtype))
    return copy_of(model, replaced)


def copy_of(space: torch.nn.Module, tensors: dict[int, torch.Tensor] | None = None) -> torch.nn.Module:
    """A copy of a workspace: with its hooks, which its forward registered and will not register again."""
    return clone(space, tensors, hooks=lambda model, hook: True)


def cast_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """What ``tensor`` becomes when a model is cast to ``dtype``: complex numbers are widened with the
    others, and there are none as narrow as bf16."""
    if tensor.is_complex() and dtype in (torch.float32, torch.float64):
        return dtype.to_complex()
    return dtype if tensor.is_floating_point() else tensor.dtype


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    """A workspace in which every dropout rate is zero.

    Rates are found where libraries keep them: in dropout modules, in float attributes with "drop" in
    their names, and in such attributes of a module's ``config``.
    """
    quiet = copy_of(model)
    for module in quiet.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        state = module.__dict__
        for name, value in list(state.items()):
            if "drop" in name and isinstance(value, float):
                state[name] = 0.0
        config = state.get("config")
        rates = [n for n, v in vars(config).items() if "drop" in n and isinstance(v, float)] if config else []
        if rates:
            state["config"] = changed = copy.copy(config)
            for name in rates:
                setattr(changed, name, 0.0)
    return quiet
