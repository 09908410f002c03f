"""Keys under which proofs are remembered: what code runs, on which shapes, with which settings.

Object ids never enter a key: thirty-two layers of one model are one proof.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable
from typing import Any, cast

import torch

from kpt.ops.callees import codes_of
from kpt.ops.captured import Captured, Seen
from kpt.ops.hypotheses import attribute_names, class_functions

#: Set for classes that Python code defines.
_HEAP_TYPE = 1 << 9
_ATOMS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)


def proof_key(captured: Captured, memo: dict[int, Any]) -> Hashable:
    """The key of one site's proof. ``memo`` holds keys of shared objects during one recognition.

    A function's key leaves its caller out; what it read from the caller is compared by `reads_key`.
    """
    module = captured.module
    if captured.function is not None:
        return (_function(captured.function, memo), captured.callee, _calls(captured, _identity))
    if all(type(inner).__module__.startswith("torch.nn.") for inner in module.modules()):
        size = _Symbols(captured)
        return (
            tuple(_module(p, inner, memo, size) for p, inner in module.named_modules()),
            _calls(captured, size),
        )
    return (
        tuple(_module(path, inner, memo, _identity) for path, inner in module.named_modules()),
        _calls(captured, _identity),
    )


def reads_key(module: torch.nn.Module, names: frozenset[str], memo: dict[int, Any]) -> Hashable:
    """What a function found in the attributes ``names`` of its calling module."""
    return tuple((name, _plain(getattr(module, name, None), memo)) for name in sorted(names))


def _identity(size: int) -> Any:
    return size


class _Symbols:
    """Sizes by the order of their appearance: torch's own modules do not depend on the numbers."""

    def __init__(self, captured: Captured) -> None:
        self.known: dict[int, str] = {}
        for tensor in (*captured.module.parameters(), *captured.module.buffers()):
            self._add(tensor.shape)
        for call in captured.calls:
            for value in call.values():
                if isinstance(value, Seen):
                    self._add(value.shape)

    def _add(self, shape: tuple[int, ...]) -> None:
        for size in shape:
            if size > 1:
                self.known.setdefault(size, f"s{len(self.known)}")

    def __call__(self, size: int) -> Any:
        return self.known.get(size, size)


def _module(path: str, module: torch.nn.Module, memo: dict[int, Any], size: Callable[[int], Any]) -> Hashable:
    read = attribute_names(type(module))
    builtin = type(module).__module__.startswith("torch.nn.")
    plain = tuple(
        (name, _sized(value, memo, size))
        for name, value in sorted(vars(module).items())
        if (builtin or name in read) and name not in ("_parameters", "_buffers", "_modules", "training")
    )
    tables = (module._parameters, module._buffers)
    return (
        path,
        tuple(_function(function, memo) for function in class_functions(type(module))),
        type(module),
        tuple(
            tuple((n, t is not None and (_shape(t.shape, size), t.dtype)) for n, t in x.items())
            for x in tables
        ),
        plain,
    )


def _shape(shape: tuple[int, ...], size: Callable[[int], Any]) -> tuple[Any, ...]:
    return tuple(map(size, shape))


def _sized(value: Any, memo: dict[int, Any], size: Callable[[int], Any]) -> Hashable:
    if type(value) is int:
        return ("int", size(value))
    if type(value) is tuple and all(type(item) is int for item in value):
        return _shape(value, size)
    return _plain(value, memo)


def _plain(value: Any, memo: dict[int, Any], depth: int = 2) -> Hashable:
    """A value as a key: by content where its content can be seen, by identity where it cannot."""
    if isinstance(value, _ATOMS):
        # 1 == 1.0 == True would share a key otherwise
        return (type(value).__name__, value)
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *(_plain(item, memo, depth) for item in value))
    if isinstance(value, (set, frozenset)):
        return ("set", *sorted((_plain(item, memo, depth) for item in value), key=repr))
    if isinstance(value, torch.Tensor):
        return ("tensor", tuple(value.shape), value.dtype)
    if isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
        return cast("Hashable", value)
    if isinstance(value, types.FunctionType):
        return _function(value, memo)
    if isinstance(value, types.MethodType):
        return (_function(value.__func__, memo), _plain(value.__self__, memo, depth))
    if isinstance(value, functools.partial):
        return ("partial", *(_plain(item, memo, depth) for item in (value.func, value.args, value.keywords)))
    if isinstance(value, dict):
        if not depth:
            return "dict"
        return tuple(sorted(((repr(k), _plain(v, memo, depth - 1)) for k, v in value.items()), key=repr))
    held = memo.get(id(value))
    known = None if held is None else held[1]
    if known is None:
        memo[id(value)] = (value, type(value))  # what refers back to itself ends here
        if isinstance(value, torch.nn.Module):
            known = tuple(_module(path, inner, memo, _identity) for path, inner in value.named_modules())
        elif type(value).__flags__ & _HEAP_TYPE and hasattr(value, "__dict__"):
            items = vars(value).items() if depth else ()
            known = (type(value), *sorted(((k, _plain(v, memo, depth - 1)) for k, v in items), key=repr))
        else:
            known = value  # the state of types written in C is out of sight
        memo[id(value)] = (value, known)  # held, so that the id stays its own
    return cast("Hashable", known)


def _function(value: Any, memo: dict[int, Any]) -> Hashable:
    if not isinstance(value, types.FunctionType):
        return cast("Hashable", value)
    held = memo.get(id(value))
    known = None if held is None else held[1]
    if known is None:
        memo[id(value)] = (value, value.__code__)
        cells = []
        for cell in value.__closure__ or ():
            try:
                cells.append(_plain(cell.cell_contents, memo, 1))
            except ValueError:
                cells.append("empty")
        known = (
            value.__module__,
            value.__code__,
            _plain(value.__defaults__ or (), memo, 1),
            tuple(cells),
            _globals(value),
        )
        memo[id(value)] = (value, known)
    return cast("Hashable", known)


def _globals(function: types.FunctionType) -> Hashable:
    """The plain values and functions that a function's code reads from its module."""
    scope = function.__globals__
    found: list[Hashable] = []
    for code in codes_of(function):
        for name in code.co_names:
            value = scope.get(name)
            if isinstance(value, _ATOMS) and value is not None:
                found.append((name, type(value).__name__, value))
            elif isinstance(value, types.FunctionType):
                found.append((name, value.__code__))
    return tuple(found)


def _calls(captured: Captured, size: Callable[[int], Any]) -> Hashable:
    return tuple(
        tuple((name, _argument(value, size)) for name, value in call.items()) for call in captured.calls
    )


def _argument(value: Any, size: Callable[[int], Any]) -> Hashable:
    if isinstance(value, Seen):
        return (_shape(value.shape, size), value.dtype, value.device)
    if isinstance(value, (tuple, list)):
        return tuple(_argument(item, size) for item in value)
    if isinstance(value, dict):
        return tuple((key, _argument(item, size)) for key, item in value.items())
    if isinstance(value, torch.nn.Module):
        return "module"
    return (type(value).__name__, value) if isinstance(value, _ATOMS) else cast("Hashable", type(value))
