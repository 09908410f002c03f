"""Kinds of calls: examples that differ so much in size or form that one figure would speak for some only."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from kpt.judge import tree
from kpt.judge.calls import Call

if TYPE_CHECKING:
    from kpt.judge.draws import InputSpec

#: Calls of one form are of one kind where the largest has at most as many times the smallest's elements.
_ALIKE = 2.0
#: Each kind wants pairs of its own: kinds beyond these join the one next in size.
_MOST = 4


@dataclass(frozen=True)
class Kind:
    """Some of the examples: a name for them, their share of all (1 together), and how to draw one more."""

    label: str
    share: float
    next_call: Callable[[], Call]


def one_kind(next_call: Callable[[], Call]) -> tuple[Kind, ...]:
    """All calls as one kind."""
    return (Kind("all calls", 1.0, next_call),)


def of_examples(spec: InputSpec, draw: Callable[[Sequence[int]], Call]) -> tuple[Kind, ...]:
    """The kinds of the examples of ``spec``; ``draw`` draws a call like one of those at some positions."""
    number = len(spec.examples)
    return tuple(
        Kind(label, len(examples) / number, partial(draw, examples)) for label, examples in group(spec)
    )


def group(spec: InputSpec) -> list[tuple[str, tuple[int, ...]]]:
    """The kinds of the examples that ``spec`` was learnt from: a label, and the positions by size.

    Kinds differ in form (structure, dtypes, ranks and constants), in whether a mask masks anything, or by
    more than a factor of two in the number of elements. Smaller ones come first.
    """
    found: dict[Any, list[tuple[int, int]]] = {}
    for number, call in enumerate(spec.examples):
        masks = spec.padding_masks(call).values()
        form = _form(call), all(bool(mask.all()) for mask in masks)
        found.setdefault(form, []).append((_elements(call), number))
    kinds: list[list[tuple[int, int]]] = []
    for members in found.values():
        members.sort()
        begin = 0
        for index in range(1, len(members) + 1):
            if index == len(members) or members[index][0] > _ALIKE * max(members[begin][0], 1):
                kinds.append(members[begin:index])
                begin = index
    kinds.sort(key=lambda members: members[0][0])
    while len(kinds) > _MOST:
        steps = [after[0][0] / max(before[-1][0], 1) for before, after in itertools.pairwise(kinds)]
        nearest = steps.index(min(steps))
        kinds[nearest : nearest + 2] = [sorted(kinds[nearest] + kinds[nearest + 1])]
    numbers = [[number for _, number in members] for members in kinds]
    return [(_label([spec.examples[each] for each in of_kind]), tuple(of_kind)) for of_kind in numbers]


def _form(call: Call) -> tuple[Any, ...]:
    return tuple(
        (path, str(leaf.dtype), leaf.dim())
        if isinstance(leaf, torch.Tensor)
        else (path, type(leaf).__qualname__, repr(leaf) if tree.is_atom(leaf) else "")
        for path, leaf in call.leaves()
    )


def _elements(call: Call) -> int:
    return sum(leaf.numel() for _, leaf in call.leaves() if isinstance(leaf, torch.Tensor))


def _label(calls: list[Call]) -> str:
    """The largest input's shape in the smallest of ``calls`` and in the largest, which come by size."""
    shapes = ["x".join(map(str, _largest_shape(call))) or "no tensor" for call in (calls[0], calls[-1])]
    return f"{' to '.join(dict.fromkeys(shapes))} ({len(calls)} example{'s' if len(calls) > 1 else ''})"


def _largest_shape(call: Call) -> tuple[int, ...]:
    tensors = [leaf for _, leaf in call.leaves() if isinstance(leaf, torch.Tensor)]
    return tuple(max(tensors, key=lambda tensor: tensor.numel()).shape) if tensors else ()
