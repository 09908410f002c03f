"""Casting a workspace to a lower floating dtype, and its inputs and outputs there and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

_FLOATS = (torch.float32, torch.float64)
#: How deep tensors are looked for inside objects that a model returns (a cache of layers of keys).
_DEPTH = 4


def cast_weights(model: torch.nn.Module, dtype: torch.dtype) -> tuple[int, Callable[[], None]]:
    """Replace every wide floating tensor of the workspace by a copy in ``dtype``; tied ones stay tied.

    Vectors in non-persistent buffers stay wide: they are constants that a model computes with in full
    precision on purpose (the frequencies of rotary embeddings). Only the workspace's own dictionaries
    change. Returns how many were replaced, and what puts the wide ones back.
    """
    copies: dict[int, torch.Tensor] = {}
    replaced: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None or tensor.dtype not in _FLOATS:
                    continue
                if (
                    store is module._buffers
                    and tensor.dim() == 1
                    and name in module._non_persistent_buffers_set
                ):
                    continue
                copy = copies.get(id(tensor))
                if copy is None:
                    cast = tensor.detach().to(dtype)
                    copy = (
                        torch.nn.Parameter(cast, requires_grad=False) if store is module._parameters else cast
                    )
                    copies[id(tensor)] = copy
                replaced.append((store, name, tensor))
                store[name] = copy  # type: ignore[assignment]

    def undo() -> None:
        for store, name, tensor in replaced:
            store[name] = tensor

    return len(copies), undo


def cast_calls(
    model: torch.nn.Module, dtype: torch.dtype, wide: torch.dtype = torch.float32
) -> Callable[[], None]:
    """Let the workspace's root take inputs in ``wide``, compute in ``dtype`` and return ``wide``."""
    inner = model.forward
    before = model.__dict__.get("forward")

    def narrow(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.dtype in _FLOATS else leaf

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map(narrow, (args, kwargs))
        return _widened(inner(*args, **kwargs), dtype, wide)

    model.forward = forward  # type: ignore[method-assign]

    def undo() -> None:
        if before is None:
            model.__dict__.pop("forward", None)
        else:
            model.__dict__["forward"] = before

    return undo


def _widened(output: Any, narrow: torch.dtype, wide: torch.dtype) -> Any:
    """``output`` with ``narrow`` tensors in ``wide``; objects change in place: the forward made them."""

    def leaf(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(wide) if value.dtype == narrow else value
        _widen_inside(value, narrow, wide, _DEPTH)
        return value

    return pytree.tree_map(leaf, output)


def _widen_inside(value: Any, narrow: torch.dtype, wide: torch.dtype, depth: int) -> None:
    """Cast the tensors that hang on an object such as a cache, at most ``depth`` levels down."""
    if depth == 0 or value is None or isinstance(value, (int, float, str, bytes, torch.nn.Module, type)):
        return
    if isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            if isinstance(item, torch.Tensor):
                if item.dtype == narrow and isinstance(value, list):
                    value[index] = item.to(wide)
            else:
                _widen_inside(item, narrow, wide, depth - 1)
        return
    if isinstance(value, dict):
        for key, item in list(value.items()):
            if isinstance(item, torch.Tensor):
                if item.dtype == narrow:
                    value[key] = item.to(wide)
            else:
                _widen_inside(item, narrow, wide, depth - 1)
        return
    for name, item in list(getattr(value, "__dict__", {}).items()):
        if isinstance(item, torch.Tensor):
            if item.dtype == narrow:
                # A frozen dataclass refuses what goes through its own interface.
                put = object.__setattr__ if _is_frozen(value) else setattr
                put(value, name, item.to(wide))
        elif not callable(item):
            _widen_inside(item, narrow, wide, depth - 1)


def _is_frozen(value: Any) -> bool:
    parameters: Any = getattr(type(value), "__dataclass_params__", None)
    return parameters is not None and bool(parameters.frozen)
