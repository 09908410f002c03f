"""What a module's parameters and attributes may stand for in a norm."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from kpt.ops.hypotheses import attribute, epsilons

if TYPE_CHECKING:
    import torch


def pairs(names: Iterable[str]) -> Iterator[dict[str, str]]:
    """The ways in which up to two vectors, by their paths, scale and shift."""
    names = list(names)
    if not names:
        yield {}
    elif len(names) == 1:
        yield {"weight": attribute(names[0])}
        yield {"bias": attribute(names[0])}
    elif len(names) == 2:
        first, second = sorted(names, key=lambda name: "bias" in name)
        yield {"weight": attribute(first), "bias": attribute(second)}
        yield {"weight": attribute(second), "bias": attribute(first)}


def inner_attributes(module: torch.nn.Module, word: str, kind: type) -> dict[str, object]:
    """Attributes of ``kind`` of the modules inside ``module`` whose name holds ``word``, as expressions."""
    return {
        f"{attribute(path)}.{name}": value
        for path, inner in module.named_modules()
        if path
        for name, value in vars(inner).items()
        if word in name and type(value) is kind
    }


def inner_epsilons(module: torch.nn.Module, x: str) -> list[tuple[str, float]]:
    """The epsilons of the modules inside; where none has one, what `epsilons` finds.

    Behind a linear layer with a bias no input is small enough to tell tiny epsilons from each other.
    """
    found = {
        value: text
        for text, value in inner_attributes(module, "eps", float).items()
        if isinstance(value, float) and value > 0
    }
    return [(text, value) for value, text in found.items()] or epsilons(module, x)
