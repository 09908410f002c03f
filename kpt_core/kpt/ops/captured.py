"""What was seen of the calls of a module or function: arguments and outputs, without their values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

_KEPT_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Seen:
    """What was seen of a tensor. ``value`` is kept for integer and boolean ones only."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]
    device: torch.device
    value: torch.Tensor | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Seen:
        keep = not tensor.is_floating_point() and not tensor.is_complex() and tensor.numel() <= _KEPT_ELEMENTS
        value = tensor.detach() if keep else None
        return cls(tuple(tensor.shape), tensor.dtype, tuple(tensor.stride()), tensor.device, value)


def see(value: Any) -> Any:
    """``value`` with every tensor replaced by what is worth remembering of it."""
    if isinstance(value, torch.Tensor):
        return Seen.of(value)
    if type(value) in (tuple, list):
        return type(value)(see(item) for item in value)
    if type(value) is dict:
        return {key: see(item) for key, item in value.items()}
    return value


def seen_in(value: Any) -> Iterator[Seen]:
    """The tensors inside ``value``, in what `see` made of it."""
    if isinstance(value, Seen):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from seen_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from seen_in(item)


@dataclass
class Captured:
    """The calls of one site: distinct ones only, with their arguments by parameter name.

    For a function or a named call, ``module`` is the module whose method ``attribute`` makes the
    call, and ``callee`` the name it uses (``apply_rotary_pos_emb``, ``F.softmax``; ``TABLE[]`` for
    an entry of a table of functions).
    """

    path: str
    module: torch.nn.Module
    signature: inspect.Signature
    calls: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    function: Callable[..., Any] | None = None
    callee: str = ""
    attribute: str = "forward"
    count: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.signature.parameters)

    def tensors(self) -> dict[str, Seen]:
        """The tensor arguments of the first call."""
        return {name: value for name, value in self.calls[0].items() if isinstance(value, Seen)}

    @property
    def output(self) -> Any:
        return self.outputs[0] if self.outputs else None

    def record(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], limit: int = 6
    ) -> dict[str, Any] | None:
        self.count += 1
        if self.count > 64 and len(self.calls) >= limit:
            return None
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError:
            return None
        bound.apply_defaults()
        call = {name: see(value) for name, value in bound.arguments.items()}
        if len(self.calls) >= limit or any(_alike(call, known) for known in self.calls):
            return None
        self.calls.append(call)
        self.outputs.append(None)
        return call


def _alike(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, Seen) or one is None or isinstance(one, (bool, int, float, str)):
        return bool(one == other)
    return True


@dataclass
class Observation:
    """Everything captured in the runs of one model."""

    modules: dict[str, Captured] = field(default_factory=dict)
    functions: dict[tuple[str, str, str], Captured] = field(default_factory=dict)
    failure: str | None = None
