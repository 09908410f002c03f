"""One canonical form for a call, however the user writes it.

``model(ids, mask)`` and ``model(input_ids=ids, attention_mask=mask)`` are the same call; a plan is
proven, guarded and compiled for one form only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

_BINDABLE = inspect.Parameter.POSITIONAL_OR_KEYWORD


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
