"""Kinds of calls: examples that differ so much in size or form that one figure would speak for some only."""

from __future__ import annotations

import enum
import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from kpt.judge import tree
from kpt.judge.calls import Call

if TYPE_CHECKING:
    from kpt.judge.draws import InputSpec

#: The largest call of a kind has at most as many times the smallest's elements.
_ALIKE = 2.0
#: Each kind wants pairs of its own: beyond these, neighbours in size become one.
_MOST = 4
#: Constants that a forward branches on, unlike numbers, which often differ from call to call.
_FLAGS = (bool, str, bytes, enum.Enum, type(None), torch.dtype, torch.device)
#: Examples that a label names.
_NAMED = 4


@dataclass(frozen=True)
class Kind:
    """Some of the examples: a name for them, their share of all (1 together), and how to draw one more."""

    label: str
    share: float
    next_call: Callable[[], Call]


@dataclass(frozen=True)
class Group:
    """Examples of one kind: a label, their positions by size, and the elements of the one in the middle."""

    label: str
    examples: tuple[int, ...]
    elements: int


def one_kind(next_call: Callable[[], Call]) -> tuple[Kind, ...]:
    """All calls as one kind."""
    return (Kind("all calls", 1.0, next_call),)


def of_examples(spec: InputSpec, draw: Callable[[Sequence[int]], Call]) -> tuple[Kind, ...]:
    """The kinds of the examples of ``spec``; ``draw`` draws a call like one of those at some positions."""
    number = len(spec.examples)
    return tuple(
        Kind(each.label, len(each.examples) / number, partial(draw, each.examples)) for each in group(spec)
    )


def group(spec: InputSpec) -> list[Group]:
    """The kinds of the examples that ``spec`` was learnt from, small ones first.

    Kinds differ in form (structure, dtypes, ranks, flags and strings), in whether a mask masks anything, or
    in size: each spans a factor of two in the number of elements, from its smallest call on. Four at most:
    beyond that, those next to each other in size become one.
    """
    found: dict[Any, list[tuple[int, int]]] = {}
    for number, call in enumerate(spec.examples):
        found.setdefault((_form(call), _masks(spec, call)), []).append((_elements(call), number))
    kinds: list[list[tuple[int, int]]] = []
    order: dict[int, tuple[bool, str]] = {}  # of calls of one size, in any order of the examples
    for (form, masked), members in found.items():
        members.sort()
        order.update(dict.fromkeys((number for _, number in members), (masked, _digest(form))))
        begin = 0
        for index in range(1, len(members) + 1):
            if index == len(members) or members[index][0] > _ALIKE * max(members[begin][0], 1):
                kinds.append(members[begin:index])
                begin = index
    kinds.sort(key=lambda members: (members[0][0], order[members[0][1]]))
    while len(kinds) > _MOST:
        steps = [
            (after[0][0] / max(before[-1][0], 1), len(before) + len(after))
            for before, after in itertools.pairwise(kinds)
        ]
        nearest = steps.index(min(steps))
        joined = kinds[nearest] + kinds[nearest + 1]
        kinds[nearest : nearest + 2] = [sorted(joined, key=lambda m: (m[0], order[m[1]], m[1]))]
    return [
        Group(
            _label(spec, [number for _, number in members]),
            tuple(number for _, number in members),
            members[len(members) // 2][0],
        )
        for members in kinds
    ]


def representatives(spec: InputSpec) -> list[tuple[Call, float]]:
    """For each kind of call its example of middle size, and the kind's share of all examples."""
    number, examples = len(spec.examples), spec.examples
    return [
        (examples[each.examples[len(each.examples) // 2]], len(each.examples) / number)
        for each in group(spec)
    ]


def described(spec: InputSpec) -> list[list[Any]]:
    """The kinds as JSON values, in one order for any order of the examples.

    Each has a digest of its form, whether it is padded, the power of two of its elements, and its share.
    """
    number = len(spec.examples)
    found: list[list[Any]] = []
    for each in group(spec):
        calls = [spec.examples[number] for number in each.examples]
        forms = sorted({_digest(_form(call)) for call in calls})
        size = math.log2(max(each.elements, 1))
        padded = any(_masks(spec, call) for call in calls)
        found.append([_digest(forms), padded, size, len(each.examples) / number])
    return sorted(found)


def alike(first: Any, second: Any) -> bool:
    """Whether two descriptions are of about the same mixture of calls.

    As many kinds, of the same forms, each within a factor of two in size and a quarter in its share.
    """
    try:
        return len(first) == len(second) and all(
            (form, padded) == (other, masked) and abs(size - wide) <= 1.0 and abs(share - part) <= 0.25
            for (form, padded, size, share), (other, masked, wide, part) in zip(first, second, strict=True)
        )
    except (TypeError, ValueError):  # not written by `described`
        return False


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _form(call: Call) -> tuple[Any, ...]:
    leaves = (_leaf_form(leaf) for _, leaf in call.leaves())
    return tree.structure(call.args), tree.structure(call.kwargs), *leaves


def _leaf_form(leaf: Any) -> tuple[str, Any]:
    if isinstance(leaf, torch.Tensor):
        return str(leaf.dtype), leaf.dim()
    return type(leaf).__qualname__, repr(leaf) if isinstance(leaf, _FLAGS) else ""


def _masks(spec: InputSpec, call: Call) -> bool:
    """Whether a mask of ``call`` masks anything."""
    return not all(bool(mask.all()) for mask in spec.padding_masks(call).values())


def _elements(call: Call) -> int:
    return sum(leaf.numel() for _, leaf in call.leaves() if isinstance(leaf, torch.Tensor))


def _label(spec: InputSpec, numbers: list[int]) -> str:
    """The largest input's shape, from the smallest of the examples to the largest, and which they are."""
    calls = [spec.examples[number] for number in numbers]
    shapes = dict.fromkeys(_largest_shape(call) for call in (calls[0], calls[-1]))
    padded = " padded" if any(_masks(spec, call) for call in calls) else ""
    named = ", ".join(map(str, sorted(numbers)[:_NAMED])) + (", ..." if len(numbers) > _NAMED else "")
    return f"{' to '.join(shapes)}{padded} (example{'s' if len(numbers) > 1 else ''} {named})"


def _largest_shape(call: Call) -> str:
    tensors = [leaf for _, leaf in call.leaves() if isinstance(leaf, torch.Tensor)]
    if not tensors:
        return "no tensor"
    shape = max(tensors, key=lambda tensor: tensor.numel()).shape
    return "x".join(map(str, shape)) or "scalar"
