"""Keys under which proofs are remembered: what code runs, on which shapes, with which settings.

Object ids never enter a key: thirty-two layers of one model are one proof.
"""

from __future__ import annotations

import types
from collections.abc import Hashable
from typing import Any

import torch

from kpt.ops.capture import Captured, Seen, codes_of
from kpt.ops.hypotheses import attribute_names

_ATOMS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)


def proof_key(captured: Captured, memo: dict[int, Any]) -> Hashable:
    """The key of one site's proof. ``memo`` holds keys of shared objects during one recognition."""
    module = captured.module
    function = captured.function
    return (
        None if function is None else _function(function),
        tuple(_module(path, inner, memo) for path, inner in module.named_modules()),
        tuple(sorted(map(_call, captured.calls), key=repr)),
        captured.callee,
    )


def _module(path: str, module: torch.nn.Module, memo: dict[int, Any]) -> Hashable:
    read = attribute_names(type(module))
    builtin = type(module).__module__.startswith("torch.nn.")
    plain = tuple(
        (name, _plain(value, memo))
        for name, value in sorted(vars(module).items())
        if (builtin or name in read) and name not in ("_parameters", "_buffers", "_modules", "training")
    )
    return (
        path,
        getattr(type(module).forward, "__code__", None),
        type(module),
        tuple((n, p is not None and (tuple(p.shape), p.dtype)) for n, p in module._parameters.items()),
        tuple((n, b is not None and (tuple(b.shape), b.dtype)) for n, b in module._buffers.items()),
        plain,
    )


def _plain(value: Any, memo: dict[int, Any], depth: int = 2) -> Hashable:
    if isinstance(value, _ATOMS):
        # 1 == 1.0 == True would share a key otherwise
        return (type(value).__name__, value)
    if isinstance(value, (tuple, list)):
        return tuple(_plain(item, memo, depth) for item in value)
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.dtype)
    if isinstance(value, torch.nn.Module):
        return type(value)
    if isinstance(value, types.FunctionType):
        return _function(value)
    if isinstance(value, types.MethodType):
        return _function(value.__func__)
    if isinstance(value, dict):
        return (
            tuple(sorted(((repr(k), _plain(v, memo, depth - 1)) for k, v in value.items()), key=repr))
            if depth
            else ()
        )
    state = getattr(value, "__dict__", None)
    if state is None or isinstance(value, (type, types.ModuleType)):
        return value if isinstance(value, type) else type(value)
    known = memo.get(id(value))
    if known is None:
        items = (
            tuple(sorted(((k, _plain(v, memo, depth - 1)) for k, v in state.items()), key=repr))
            if depth
            else ()
        )
        known = memo[id(value)] = (type(value), items)
    return known  # type: ignore[no-any-return]


def _function(value: Any) -> Hashable:
    if isinstance(value, types.FunctionType):
        cells = tuple(
            cell.cell_contents for cell in value.__closure__ or () if isinstance(cell.cell_contents, _ATOMS)
        )
        return (tuple(codes_of(value)), repr(value.__defaults__), cells)
    return getattr(value, "__qualname__", repr(type(value)))


def _call(call: dict[str, Any]) -> Hashable:
    return tuple((name, _argument(value)) for name, value in call.items())


def _argument(value: Any) -> Hashable:
    if isinstance(value, Seen):
        return (value.shape, value.dtype, value.device)
    if isinstance(value, (tuple, list)):
        return tuple(map(_argument, value))
    if isinstance(value, dict):
        return tuple((key, _argument(item)) for key, item in value.items())
    return (type(value).__name__, value) if isinstance(value, _ATOMS) else type(value)
