"""Casting a workspace to a lower floating dtype, and its inputs and outputs there and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from kpt.specs import replace_forward
from kpt_plugin_cpu import nested

_FLOATS = (torch.float32, torch.float64)


def wide_dtype(model: torch.nn.Module) -> torch.dtype | None:
    """The dtype of the model's outputs in eager mode: that of its weights, where they are of one width.

    None where some are float32 and some float64: which outputs are in which is not known.
    """
    found = {tensor.dtype for _, _, tensor in _wide(model)}
    if len(found) > 1:
        return None
    return found.pop() if found else torch.float32


def _wide(model: torch.nn.Module) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    """Every parameter and buffer that a cast concerns, with the dictionary that holds it and its name there.

    Vectors in non-persistent buffers are none: they are constants that a model computes with in full
    precision on purpose (the frequencies of rotary embeddings).
    """
    for module in model.modules():
        constants = module._non_persistent_buffers_set
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            for name, tensor in store.items():
                if tensor is None or tensor.dtype not in _FLOATS:
                    continue
                if not (store is module._buffers and tensor.dim() == 1 and name in constants):
                    yield store, name, tensor


def cast_weights(model: torch.nn.Module, dtype: torch.dtype) -> tuple[int, Callable[[], None]]:
    """Replace every wide floating tensor of the workspace by a copy in ``dtype``; tied ones stay tied.

    Constants stay wide. Only the workspace's own dictionaries change. Returns how many were replaced, and
    what puts the wide ones back.
    """
    copies: dict[int, torch.Tensor] = {}
    replaced = list(_wide(model))
    for store, name, tensor in replaced:
        narrowed = copies.get(id(tensor))
        if narrowed is None:
            narrowed = tensor.detach().to(dtype)
            if isinstance(tensor, torch.nn.Parameter):
                narrowed = torch.nn.Parameter(narrowed, requires_grad=False)
            copies[id(tensor)] = narrowed
        store[name] = narrowed

    def undo() -> None:
        for store, name, tensor in replaced:
            store[name] = tensor

    return len(copies), undo


def cast_calls(
    model: torch.nn.Module, dtype: torch.dtype, wide: torch.dtype = torch.float32
) -> Callable[[], None]:
    """Let the workspace's root take inputs in ``wide``, compute in ``dtype`` and return ``wide``."""
    inner = model.forward

    def cast(tensor: torch.Tensor) -> torch.Tensor | None:
        return tensor.to(dtype) if tensor.dtype in _FLOATS else None

    def narrow(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) or dataclasses.is_dataclass(leaf):
            return nested.changed(leaf, cast)
        return leaf

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map(narrow, (args, kwargs))
        return widened(inner(*args, **kwargs), dtype, wide)

    return replace_forward(model, forward)


def widened(output: Any, narrow: torch.dtype, wide: torch.dtype) -> Any:
    """``output`` with ``narrow`` tensors in ``wide``; what holds some is copied: the model may keep it."""

    def cast(tensor: torch.Tensor) -> torch.Tensor | None:
        return tensor.to(wide) if tensor.dtype is narrow else None

    return pytree.tree_map(lambda leaf: nested.changed(leaf, cast), output)
