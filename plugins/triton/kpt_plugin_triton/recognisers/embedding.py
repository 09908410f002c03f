"""Recognises embedding_sum_norm: how BERT and its kin begin."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from kpt.ops import Hypothesis
from kpt.ops.captured import Seen
from kpt.ops.hypotheses import attribute, own_parameters
from kpt_plugin_triton.recognisers.candidates import inner_epsilons, pairs

if TYPE_CHECKING:
    from kpt.ops.captured import Captured

_OP = "embedding_sum_norm"


class EmbeddingSumNorms:
    """Proposes embedding_sum_norm for a module of one to three tables and a norm, given token numbers."""

    def hypotheses(self, module: torch.nn.Module, captured: Captured) -> Iterator[Hypothesis]:
        numbers, parameters, output = captured.tensors(), own_parameters(module), captured.output
        if not 1 <= len(numbers) <= 3 or any(seen.dtype != torch.int64 for seen in numbers.values()):
            return
        tables = {name: value for name, value in parameters.items() if value.dim() == 2}
        vectors = [name for name, value in parameters.items() if value.dim() == 1]
        if not 1 <= len(tables) <= 3 or not 1 <= len(vectors) <= 2 or not isinstance(output, Seen):
            return
        shapes = {seen.shape for seen in numbers.values() if len(seen.shape) == 2}
        if len(parameters) != len(tables) + len(vectors) or output.shape[:-1] not in shapes:
            return
        if any(value.shape[-1:] != output.shape[-1:] for value in parameters.values()):
            return
        ids = [name for name, seen in numbers.items() if seen.shape == output.shape[:-1]]
        norms = list(itertools.product(inner_epsilons(module, "torch.ones(())"), pairs(vectors)))
        for sources in _sources(module, ids, numbers, len(tables)):
            for named in itertools.permutations(tables):
                sizes = [(tables[path].shape[0], path) for path in named[1:]]
                if sizes != sorted(sizes, reverse=True):
                    continue  # the same sum in another order; there are more positions than types
                arguments, limits = _looked_up(module, sources, named, parameters, numbers)
                for (eps, value), affine in norms:
                    given = {**arguments, **affine, "eps": eps}
                    yield Hypothesis(_OP, given, scales=(value**0.5,), integers=limits)


def _sources(
    module: torch.nn.Module, ids: list[str], numbers: dict[str, Seen], tables: int
) -> Iterator[tuple[str, ...]]:
    """Which numbers the words, positions and types are looked up by: arguments, buffers, or their place."""
    for words in ids:
        given = [name for name in numbers if name != words]
        held = [
            f"{attribute(name)}[:, :{words}.shape[1]]"
            for name, value in module.named_buffers()
            if value.dtype == torch.int64 and value.dim() == 2
        ]
        padding = f"({words} != self.padding_idx)"
        counted = [f"{padding}.cumsum(1) * {padding} + self.padding_idx"]
        in_order = [f"torch.arange({words}.shape[1], device={words}.device)[None]"]
        others = given + (counted if type(vars(module).get("padding_idx")) is int else [])
        others += held or in_order
        for rest in itertools.permutations(others, tables - 1):
            if set(given) <= set(rest):
                yield words, *rest


def _looked_up(
    module: torch.nn.Module,
    sources: tuple[str, ...],
    tables: tuple[str, ...],
    parameters: dict[str, torch.Tensor],
    numbers: dict[str, Seen],
) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """The op's arguments for these tables, and the range of each argument that counts their rows."""
    names = [("ids", "words"), ("position_ids", "positions"), ("type_ids", "types")]
    if len(tables) == 2 and parameters[tables[1]].shape[0] < 8:
        names = [names[0], names[2]]  # a sum of two: which it is makes no difference but to people
    arguments: dict[str, str] = {}
    for (number, table), source, path in zip(names, sources, tables):
        arguments |= {number: source, table: attribute(path)}
    owner = tables[0].rpartition(".")[0]
    if hasattr(module.get_submodule(owner) if owner else module, "padding_idx"):
        arguments["padding_idx"] = f"{attribute(owner) if owner else 'self'}.padding_idx"
    limits = {s: (0, parameters[path].shape[0]) for s, path in zip(sources, tables) if s in numbers}
    return arguments, limits
