"""Deep copies and pickles of an optimised model: as if kpt had never touched it.

What kpt sets on a model are attributes of instances. `copy.deepcopy` and `pickle` ask the instance for
``__reduce_ex__`` before its class, so that an attribute of that name leaves ours out of the state, its own
name included. A class with a ``__deepcopy__`` of its own may copy the attributes all the same: they are
inert in the copy, whose handle is empty.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

HANDLE = "_kpt_plan"
REDUCE = "__reduce_ex__"
#: Bound methods, which are ours if their code is.
_METHODS = ("forward", "_apply", REDUCE)
_our_code: set[types.CodeType] = set()
_Function = TypeVar("_Function", bound=Callable[..., Any])


def ours(function: _Function) -> _Function:
    """Mark ``function``: bound to a model as one of its methods, it is left out of copies and pickles."""
    _our_code.add(function.__code__)  # type: ignore[attr-defined]
    return function


class Handle:
    """Carries a plan on its model; copies and pickles of the handle are None."""

    def __init__(self, plan: Any = None) -> None:
        self.plan = plan

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


@ours
def reduce_ex(self: torch.nn.Module, protocol: Any) -> Any:
    """What the class's own ``__reduce_ex__`` gives, with what was on the instance before kpt."""
    reduced: Any = getattr(type(self), REDUCE)(self, protocol)
    if not isinstance(reduced, tuple) or len(reduced) < 3:
        return reduced
    state = reduced[2]
    if isinstance(state, dict):
        state = _without_ours(state)
    elif isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], dict):  # beside slots
        state = (_without_ours(state[0]), state[1])
    return (*reduced[:2], state, *reduced[3:])


def clean_copies(module: torch.nn.Module) -> Callable[[], None]:
    """Keep what kpt sets on ``module`` out of its copies and pickles; return what ends that.

    An instance that has a ``__reduce_ex__`` of somebody else keeps it.
    """
    present = module.__dict__.get(REDUCE)
    if present is None or _is_ours(present):
        module.__dict__[REDUCE] = types.MethodType(reduce_ex, module)

    def undo() -> None:
        if _is_ours(module.__dict__.get(REDUCE)):
            del module.__dict__[REDUCE]

    return undo


def _without_ours(state: dict[str, Any]) -> dict[str, Any]:
    left = {
        name: value
        for name, value in state.items()
        if name != HANDLE and not (name in _METHODS and _is_ours(value))
    }
    # The root's forward stands in place of one that the instance may have had itself.
    previous = getattr(getattr(state.get(HANDLE), "plan", None), "previous", None)
    if previous is not None:
        left.setdefault("forward", previous)
    return left


def _is_ours(value: Any) -> bool:
    code = getattr(getattr(value, "__func__", None), "__code__", None)
    return code is not None and code in _our_code
