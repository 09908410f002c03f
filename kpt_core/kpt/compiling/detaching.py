"""Compiled code for inputs without a gradient, called where none is recorded: in inference mode, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from kpt.compiling.call_structure import fields_of, with_fields

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def without_gradients(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], dict[int, torch.Tensor]]:
    """The arguments with every tensor that requires a gradient detached, and those by their stand-ins' ids.

    What is one tensor stays one. Tensors are looked for in lists, tuples, dictionaries and dataclasses.
    """
    (plain, named), stand_ins = _exchanged(
        args, kwargs, lambda tensor: tensor.detach() if tensor.requires_grad else tensor
    )
    return plain, named, {id(stand_in): tensor for tensor, stand_in in stand_ins}


def outside_of_inference_mode(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The arguments with ordinary tensors on the same memory in place of those made in inference mode.

    They are for guards to look at. To be called outside of inference mode.
    """
    return _exchanged(args, kwargs, _ordinary)[0]


def _ordinary(tensor: torch.Tensor) -> torch.Tensor:
    plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_quantized
    if not tensor.is_inference() or not plain or tensor.is_conj() or tensor.is_neg():
        return tensor
    made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return made.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[call-overload, no-any-return]


def _exchanged(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[Arguments, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The arguments with ``change(tensor)`` for each tensor, and the pairs of those that differ."""
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def visit(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) not in found:
                found[id(value)] = (value, change(value))
            return found[id(value)][1]
        if type(value) in (list, tuple):
            return type(value)(map(visit, value))
        if type(value) is dict:
            return {key: visit(item) for key, item in value.items()}
        if (fields := fields_of(value)) is not None:
            return with_fields(value, {name: visit(item) for name, item in fields.items()})
        return value

    changed = visit(args), visit(kwargs)
    return changed, [pair for pair in found.values() if pair[0] is not pair[1]]


def detaching(target: Callable[..., Any]) -> Callable[..., Any]:
    """``target`` for calls whose tensors require a gradient; an input that it returns is the caller's own."""

    def run(*args: Any, **kwargs: Any) -> Any:
        plain, named, own = without_gradients(args, kwargs)
        output = target(*plain, **named)
        if not any(id(leaf) in own for leaf in tree_leaves(output)):
            return output
        return tree_map(lambda leaf: own.get(id(leaf), leaf), output)

    return run
