"""The one patch on a user's model: a root forward that asks the plan, and how it is put on and taken off.

The patch is a bound method of a plain function named ``forward``; the plan hangs on the model in a
handle, which deep copies and pickles leave out (`kpt.transaction.copies`). So they run the original
forward with their own weights, and a plan dies with its model. What a plan does with a call is in
`kpt.transaction.serving`.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from kpt.transaction.copies import HANDLE, Handle, clean_copies, ours
from kpt.transaction.unwind import unwind

_is_compiling = torch.compiler.is_compiling
_is_tracing = torch._C._is_tracing


@ours
def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    handle = self.__dict__.get("_kpt_plan")
    if handle is None or handle.plan is None:
        return type(self).forward(self, *args, **kwargs)
    if _is_compiling() or _is_tracing():  # written so that dynamo can follow it
        previous = handle.plan.previous
        return type(self).forward(self, *args, **kwargs) if previous is None else previous(*args, **kwargs)
    return handle.plan(self, args, kwargs)


def is_dispatcher(function: Any) -> bool:
    """Whether this is our root forward. Not told by an attribute: `functools.wraps` copies those."""
    return getattr(getattr(function, "__func__", None), "__code__", None) is forward.__code__


def plan_of(model: torch.nn.Module) -> Any:
    """The plan that ``model`` carries (committed or deferred), or None."""
    handle = model.__dict__.get(HANDLE)
    return handle.plan if isinstance(handle, Handle) else None


def own_forward(model: torch.nn.Module) -> Any:
    """A forward that somebody else set on the instance, or None."""
    current = model.__dict__.get("forward")
    return None if current is None or is_dispatcher(current) else current


def forward_of_class(model: torch.nn.Module) -> Callable[..., Any]:
    """The forward that ``model`` has from its class: bound, unless it is a static method."""
    cls = type(model)
    for base in cls.__mro__:
        found = base.__dict__.get("forward")
        if found is not None:
            return found.__get__(model, cls) if hasattr(found, "__get__") else found  # type: ignore[no-any-return]
    raise AttributeError(f"{cls.__name__} has no forward")


def original_forward(model: torch.nn.Module) -> Callable[..., Any]:
    """The user's forward, whether or not a plan is installed."""
    plan = plan_of(model)
    if plan is not None:
        return plan.original(model)  # type: ignore[no-any-return]
    return own_forward(model) or forward_of_class(model)


def install(model: torch.nn.Module, plan: Any) -> Callable[[], None]:
    """Route ``model.forward`` through ``plan``; return what takes it out again.

    Raises (from the returned function):
        RuntimeError: somebody wrapped the forward since, in a way that cannot be unwound.
    """
    previous = own_forward(model)
    original = plan.original(model)
    signature = inspect.signature(original)
    function = types.FunctionType(forward.__code__, forward.__globals__, "forward")
    for name in ("__doc__", "__module__", "__qualname__"):
        setattr(function, name, getattr(original, name, None) or getattr(function, name))
    function.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[inspect.Parameter("self", _first_kind(signature)), *signature.parameters.values()]
    )
    installed = types.MethodType(function, model)
    model.__dict__[HANDLE] = Handle(plan)
    model.__dict__["forward"] = installed
    dirty_copies = clean_copies(model)

    def undo() -> None:
        current = model.__dict__.get("forward")
        ours = current is installed
        # Known are the cell here and the argument, ``current`` and the dictionary that it is from.
        kept = sys.getrefcount(installed) > (4 if ours else 2) or sys.getrefcount(installed.__func__) > 2
        if kept:
            replacement = previous if previous is not None else forward_of_class(model)
            unwind(installed, replacement, None if ours else current)
        if ours and previous is None:
            del model.__dict__["forward"]
        elif ours:
            model.__dict__["forward"] = previous
        model.__dict__.pop(HANDLE, None)
        dirty_copies()

    return undo


def _first_kind(signature: inspect.Signature) -> Any:
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    only = inspect.Parameter.POSITIONAL_ONLY
    return only if only in kinds else inspect.Parameter.POSITIONAL_OR_KEYWORD
