"""Casting a workspace to a lower floating dtype, and its inputs and outputs there and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kpt.judge import tree

_FLOATS = (torch.float32, torch.float64)


def cast_weights(model: torch.nn.Module, dtype: torch.dtype) -> int:
    """Replace every wide floating tensor of the workspace by a copy in ``dtype``; tied ones stay tied.

    Returns how many were replaced. Only the workspace's own dictionaries change.
    """
    copies: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None or tensor.dtype not in _FLOATS:
                    continue
                copy = copies.get(id(tensor))
                if copy is None:
                    cast = tensor.detach().to(dtype)
                    copy = (
                        torch.nn.Parameter(cast, requires_grad=False) if store is module._parameters else cast
                    )
                    copies[id(tensor)] = copy
                store[name] = copy  # type: ignore[assignment]
    return len(copies)


def cast_calls(
    model: torch.nn.Module, dtype: torch.dtype, wide: torch.dtype = torch.float32
) -> Callable[[], None]:
    """Let the workspace's root take inputs in ``wide``, compute in ``dtype`` and return ``wide``."""
    inner = model.forward

    def narrow(path: Any, leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.dtype in _FLOATS else leaf

    def widen(path: Any, leaf: Any) -> Any:
        return leaf.to(wide) if isinstance(leaf, torch.Tensor) and leaf.dtype == dtype else leaf

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = torch.utils._pytree.tree_map(lambda leaf: narrow((), leaf), (args, kwargs))
        return _widened(inner(*args, **kwargs), widen)

    model.forward = forward  # type: ignore[method-assign]

    def undo() -> None:
        model.__dict__.pop("forward", None)

    return undo


def _widened(output: Any, widen: Callable[[Any, Any], Any]) -> Any:
    if isinstance(output, torch.Tensor):
        return widen((), output)
    if type(output) in (tuple, list, dict) or torch.utils._pytree.SUPPORTED_NODES.get(type(output)):
        return torch.utils._pytree.tree_map(lambda leaf: widen((), leaf), output)
    return tree.rebuild(output, widen)
