"""How passes put a function around the forward of a workspace, and take it off again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from kpt.specs import Undo


def wrap_forward(
    module: torch.nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Undo:
    """Set ``module.forward`` to ``make(forward)`` with the same signature; return what undoes it."""
    before = module.__dict__.get("forward")
    inner = module.forward
    outer = make(inner)
    try:
        functools.update_wrapper(outer, inner)
    except AttributeError:  # an object without such attributes, a compiled forward for instance
        outer.__wrapped__ = inner  # type: ignore[attr-defined]
    module.__dict__["forward"] = outer

    def undo() -> None:
        if before is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = before

    return undo
