"""The one patch on a user's model: a root forward that asks the plan, and how it is put on and taken off.

The patch is a bound method of a plain function named ``forward``; the plan hangs on the model in a
handle, which deep copies and pickles leave out (`kpt.transaction.copies`). So they run the original
forward with their own weights, and a plan dies with its model. What a plan does with a call is in
`kpt.transaction.serving`.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch

from kpt.transaction.copies import HANDLE, Handle, clean_copies

_is_compiling = torch.compiler.is_compiling
_is_tracing = torch._C._is_tracing


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
        if current is installed:
            if previous is None:
                del model.__dict__["forward"]
            else:
                model.__dict__["forward"] = previous
        elif current is not None:
            _unwind(model, current, installed, previous)
        model.__dict__.pop(HANDLE, None)
        dirty_copies()

    return undo


def _first_kind(signature: inspect.Signature) -> Any:
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    only = inspect.Parameter.POSITIONAL_ONLY
    return only if only in kinds else inspect.Parameter.POSITIONAL_OR_KEYWORD


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that was not assigned yet
        return None


def _reaches(function: Any, installed: Any, model: torch.nn.Module) -> bool:
    """Whether ``function`` may call ``installed``: a plain function that holds and names nothing that does is
    no wrapper around it, but what somebody put in its place."""
    seen: set[int] = set()
    pending = [function]
    while pending:
        value = pending.pop()
        if value is installed:
            return True
        if id(value) in seen or not callable(value) or isinstance(value, (type, torch.nn.Module)):
            continue
        seen.add(id(value))
        if isinstance(value, types.MethodType):
            pending += [value.__func__] if value.__self__ is model else [value.__func__, value.__self__]
            continue
        if isinstance(value, types.BuiltinFunctionType):
            continue
        if not isinstance(value, types.FunctionType):
            return True  # nobody can say what it calls
        pending += [_content(cell) for cell in value.__closure__ or ()]
        pending += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        pending += vars(value).values()
        named = (value.__globals__.get(name) for name in _named(value.__code__))
        pending += [held for held in named if isinstance(held, (types.FunctionType, types.MethodType))]
    return False


def _named(code: types.CodeType) -> set[str]:
    """The globals and attributes that ``code`` and the functions inside it name."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(_named, inner))


def _unwind(model: torch.nn.Module, wrapper: Any, installed: Any, previous: Any) -> None:
    """Take the dispatcher out from under a wrapper that was put around it after the commit."""
    replacement = previous if previous is not None else forward_of_class(model)
    for name, value in vars(model).items():
        if value is installed and name != "forward":  # accelerate keeps the wrapped forward here
            model.__dict__[name] = replacement
            return
    unwound = False
    seen: set[int] = set()
    pending = [wrapper]
    while pending:
        function = pending.pop()
        function = getattr(function, "__func__", function)
        if id(function) in seen:
            continue
        seen.add(id(function))
        for cell in getattr(function, "__closure__", None) or ():
            content = _content(cell)
            if content is installed:
                cell.cell_contents = replacement
                unwound = True
            elif callable(content):
                pending.append(content)
        # What `functools.wraps` keeps serves signatures only.
        if getattr(function, "__wrapped__", None) is installed:
            function.__wrapped__ = replacement
        elif getattr(function, "__wrapped__", None) is installed.__func__:
            function.__wrapped__ = getattr(replacement, "__func__", replacement)
        for inner in (getattr(function, "__wrapped__", None), getattr(function, "func", None)):
            if callable(inner):
                pending.append(inner)
    if unwound or not _reaches(wrapper, installed, model):
        return
    raise RuntimeError(
        f"{getattr(wrapper, '__qualname__', type(wrapper).__name__)} wraps the optimised forward and cannot "
        "be unwound; remove that wrapper, then call kpt.restore(model) again"
    )
