"""What compiled forwards take over from those made before them, and who collects those that a plan makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

_created: ContextVar[Created | None] = ContextVar("kpt_compiled_forwards", default=None)


@dataclass(frozen=True)
class FurtherInputs:
    """Inputs of a graph that are made of a call's arguments before compiled code is entered.

    ``make(args, kwargs)`` gives keyword arguments, tensors, beside the call's own; ``taken_by(forward)`` is a
    forward that takes them too. ``dims`` names their dynamic axes, as ``dynamic_dims`` does.
    """

    make: Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any]]
    taken_by: Callable[[Callable[..., Any]], Callable[..., Any]]
    dims: Mapping[str, Mapping[int, Any]] = field(default_factory=dict)


class Created(list[Any]):
    """What was made inside one `collect` block; ``captured`` hands its graph passes to what comes later."""

    captured: Any = None

    def inherit(self) -> Any:
        """Whose passes a new one has to run before its own; who had them is idle from now on."""
        source = self.captured
        if source is None:
            return None
        source.idle = True
        if source in self:
            self.remove(source)
        return source


@contextmanager
def collect() -> Iterator[list[Any]]:
    """The `CompiledForward` objects made inside the block, in this thread and context.

    One that is made after a `CapturedForward` takes over its graph passes, and its place in the list.
    """
    created = Created()
    token = _created.set(created)
    try:
        yield created
    finally:
        _created.reset(token)
        outer = _created.get()
        if outer is not None:
            outer.extend(created)


def collecting() -> Created | None:
    """What was made so far inside of the innermost `collect` block, if there is one."""
    return _created.get()
