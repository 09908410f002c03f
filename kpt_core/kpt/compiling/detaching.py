"""Compiled code for inputs without a gradient, called with inputs that require one where none is recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map


def without_gradients(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], dict[int, torch.Tensor]]:
    """The arguments with every tensor that requires a gradient detached, and those by their stand-ins' ids.

    What is one tensor stays one. Tensors are looked for in lists, tuples and dictionaries.
    """
    stand_ins: dict[int, torch.Tensor] = {}
    own: dict[int, torch.Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if not value.requires_grad:
                return value
            if id(value) not in stand_ins:
                stand_ins[id(value)] = value.detach()
                own[id(stand_ins[id(value)])] = value
            return stand_ins[id(value)]
        if type(value) in (list, tuple):
            return type(value)(map(plain, value))
        if type(value) is dict:
            return {key: plain(item) for key, item in value.items()}
        return value

    return plain(args), plain(kwargs), own


def detaching(target: Callable[..., Any]) -> Callable[..., Any]:
    """``target`` for calls whose tensors require a gradient; an input that it returns is the caller's own."""

    def run(*args: Any, **kwargs: Any) -> Any:
        plain, named, own = without_gradients(args, kwargs)
        output = target(*plain, **named)
        if not any(id(leaf) in own for leaf in tree_leaves(output)):
            return output
        return tree_map(lambda leaf: own.get(id(leaf), leaf), output)

    return run
