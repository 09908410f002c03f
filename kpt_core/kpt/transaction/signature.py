"""One canonical form for a call, however the user writes it.

``model(ids, mask)`` and ``model(input_ids=ids, attention_mask=mask)`` are the same call, and so are
``model(ids)`` and ``model(ids, attention_mask=None)`` where None is the default; a plan is proven,
guarded and compiled for one form only.
"""

from __future__ import annotations

import enum
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch

_BINDABLE = inspect.Parameter.POSITIONAL_OR_KEYWORD
#: Defaults that nothing can change. Only of numbers and strings may there be two equal objects.
_CONSTANTS = (type(None), bool, int, float, str, enum.Enum, torch.dtype)


class Canonical:
    """Moves positional arguments to keywords where the forward's signature allows it.

    A forward with ``*args`` or positional-only parameters keeps its positional arguments.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        try:
            parameters = list(inspect.signature(forward).parameters.values())
        except (TypeError, ValueError):
            parameters = []
        kinds = {parameter.kind for parameter in parameters}
        self.by_name = bool(parameters) and not kinds & {
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.POSITIONAL_ONLY,
        }
        self.names = tuple(p.name for p in parameters if p.kind is _BINDABLE) if self.by_name else ()

    def __call__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` in canonical form; a call that Python would refuse comes back as it is."""
        if not args or not self.by_name or len(args) > len(self.names):
            return args, kwargs
        named = dict(zip(self.names, args))
        if not kwargs:
            return (), named
        if not named.keys().isdisjoint(kwargs):
            return args, kwargs
        named.update(kwargs)
        return (), named


def constant_defaults(forward: Callable[..., Any]) -> dict[str, Any]:
    """Constants that ``forward`` takes for parameters left out of a call, where they can go by keyword.

    Read from the function that is called, and not from its signature: that of a wrapper
    (`functools.wraps`) is the wrapped function's, while the wrapper itself may tell an argument that
    is passed from one that is left out. Of a forward that is no plain function or method nothing is known.
    """
    function = getattr(forward, "__func__", forward)
    if not isinstance(function, types.FunctionType):
        return {}
    code, given = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[: code.co_argcount]
    defaults = dict(zip(names[len(names) - len(given) :], given))
    by_position = max(code.co_posonlyargcount, function is not forward)  # ``self`` is bound already
    for name in names[:by_position]:
        defaults.pop(name, None)
    defaults.update(function.__kwdefaults__ or {})
    return {name: value for name, value in defaults.items() if isinstance(value, _CONSTANTS)}


def defaults_in(kwargs: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``kwargs`` that say what holds without them."""
    return {
        name: defaults[name]
        for name, value in kwargs.items()
        if name in defaults and _same(value, defaults[name])
    }


def _same(value: Any, default: Any) -> bool:
    """Whether no forward can tell two values apart: 1, 1.0 and True are equal, as are 0.0 and -0.0."""
    kind = type(default)
    if value is default or type(value) is not kind:
        return value is default
    if kind is float:
        return bool(value.hex() == default.hex())
    return kind in (int, str) and bool(value == default)
