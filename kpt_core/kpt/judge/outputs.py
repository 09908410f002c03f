"""What a call returned: its named leaves, which of them are equal, and where its padding lies."""

from __future__ import annotations

import math
import sys
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from kpt.judge import tree
from kpt.judge.bitwise import bitwise_equal

#: True is equal to 1, and 1 to 1.0.
_NUMBERS = (bool, int, float, complex)


@dataclass(frozen=True)
class Leaf:
    """One part of an output: its name, for instance ``logits`` or ``past.layers[0].keys``.

    ``kind`` is the class of what was returned, where ``value`` is a tensor made of it.
    """

    name: str
    value: Any
    kind: type

    @property
    def is_tensor(self) -> bool:
        return isinstance(self.value, torch.Tensor)


def leaves(output: Any) -> list[Leaf]:
    """The named leaves of ``output`` in a stable order; NumPy's arrays and numbers as tensors."""
    return [Leaf(tree.spell(path), _as_tensor(leaf), type(leaf)) for path, leaf in tree.walk(output)]


def _as_tensor(leaf: Any) -> Any:
    """A tensor with a copy of what an array of numbers holds; anything else as it is."""
    numpy = sys.modules.get("numpy")
    if numpy is None or tree.is_atom(leaf) or not isinstance(leaf, (numpy.ndarray, numpy.generic)):
        return leaf
    try:
        return torch.from_numpy(numpy.array(leaf))
    except (TypeError, ValueError):  # text, objects, dates; another byte order
        return leaf


def computed_later(leaf: Any) -> bool:
    """Whether what a leaf holds is computed after the call: a generator, a coroutine, a future."""
    return isinstance(leaf, (Iterator, AsyncIterator, Awaitable, Future))


def equal_objects(first: Any, second: Any, depth: int = 12) -> bool:
    """Whether two leaves that are no tensors are the same to whoever gets them.

    Numbers of one class are compared up to rounding, objects by their own ``==`` or else by what they hold.
    What has neither, or is nested deeper than ``depth``, is not equal.
    """
    if isinstance(first, _NUMBERS) and isinstance(second, _NUMBERS) and type(first) is not type(second):
        return False
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=1e-5) or (math.isnan(first) and math.isnan(second))
    if first is second:
        return True
    if depth == 0:
        return False
    if type(first) in (list, tuple) and type(first) is type(second):
        pairs = list(zip(first, second))
        return len(first) == len(second) and all(equal_objects(*pair, depth - 1) for pair in pairs)
    if type(first) is dict and type(second) is dict:
        return first.keys() == second.keys() and all(
            equal_objects(value, second[key], depth - 1) for key, value in first.items()
        )
    if tree.is_atom(first) or type(first) is not type(second) or type(first).__eq__ is not object.__eq__:
        try:
            shapes = [(getattr(v, "shape", None), getattr(v, "dtype", None)) for v in (first, second)]
            if shapes[0] != shapes[1]:  # `==` would broadcast
                return False
            same = first == second
            return bool(same.all() if hasattr(same, "all") else same)
        except (RuntimeError, TypeError, ValueError):
            return False
    if not hasattr(first, "__dict__"):
        return False
    return equal_objects(vars(first), vars(second), depth - 1)


def tensors(output: Any) -> dict[str, torch.Tensor]:
    """The tensors of ``output`` by name."""
    return {leaf.name: leaf.value for leaf in leaves(output) if leaf.is_tensor}


def is_logits(name: str) -> bool:
    """Whether a leaf is named as unnormalised scores over its last axis."""
    return "logits" in name.rsplit(".", 1)[-1].lower()


def valid_axis(tensor: torch.Tensor, mask: torch.Tensor) -> int | None:
    """The axis of ``tensor`` that runs along the sequence of ``mask`` [batch, sequence], if any.

    Outputs are [batch, sequence, ...]; attention weights and cached keys are [batch, heads,
    sequence, ...].
    """
    batch, sequence = mask.shape
    if tensor.dim() < 2 or tensor.shape[0] != batch:
        return None
    order = (2, 1) if tensor.dim() == 4 else (1,)
    return next((axis for axis in order if tensor.shape[axis] == sequence), None)


def mask_for(name: str, tensor: torch.Tensor, masks: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The mask that says which positions of the output ``name`` count.

    Of an encoder's and a decoder's mask, outputs named ``encoder...`` follow the first, all others
    the second, as far as their shapes allow.
    """
    fitting = {key: mask for key, mask in masks.items() if valid_axis(tensor, mask) is not None}
    decoder = not name.startswith("encoder")
    order = sorted(fitting, key=lambda key: key.startswith("decoder") != decoder)
    return fitting[order[0]] if order else None


def select_valid(tensor: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The positions of ``tensor`` that ``mask`` [batch, sequence] keeps; all of it if it has no such axes."""
    if mask is None:
        return tensor
    axis = valid_axis(tensor, mask)
    if axis is None:
        return tensor
    return tensor.movedim(axis, 1)[mask.to(device=tensor.device, dtype=torch.bool)]


def identical(first: Any, second: Any) -> str | None:
    """None if both outputs are equal bit for bit, else the name of the first leaf that differs."""
    if tree.structure(first) != tree.structure(second):
        return "structure"
    for mine, yours in zip(leaves(first), leaves(second), strict=True):
        if mine.is_tensor:
            if not bitwise_equal(mine.value, yours.value):
                return mine.name
        elif tree.is_atom(mine.value) and mine.value != yours.value and mine.value == mine.value:
            return mine.name
    return None
