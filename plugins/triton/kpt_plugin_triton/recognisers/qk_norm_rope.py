"""Recognises qk_norm_rope in a captured graph: queries and keys whose heads are normed, then rotated."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from kpt.ops import Hypothesis
from kpt.ops.hypotheses import attribute, epsilons, own_parameters
from kpt.ops.regions import Region, base_name
from kpt.ops.regions import regions as known_regions

if TYPE_CHECKING:
    from torch.fx import Graph

    from kpt.ops.captured import Captured, Seen

_OP = "qk_norm_rope"
#: What may stand between the norm of a head and its rotation.
_LAYOUT = frozenset({"transpose", "contiguous", "to", "type_as"})


class QkNormRopes:
    """Proposes qk_norm_rope for two tensors of heads and two tables."""

    marks: Mapping[str, tuple[str, ...]] = {_OP: ("neg",)}

    def hypotheses(self, module: torch.nn.Module, captured: Captured) -> Iterator[Hypothesis]:
        tensors, output, weights = captured.tensors(), captured.output, own_parameters(module)
        if len(tensors) != 4 or type(output) is not tuple or len(output) != 2 or len(weights) not in (0, 2):
            return
        (q, one), (k, other), (first, table), (second, _) = tensors.items()
        if len(one.shape) != 4 or len(other.shape) != 4:
            return
        names = [attribute(name) for name in weights] or ["None", "None"]
        for turn, spread in itertools.product(_turns(one, output[0]), _spreads(table)):
            for cos, sin in ((first, second), (second, first)):
                given = {
                    "q": turn.format(q),
                    "k": turn.format(k),
                    "q_weight": names[0],
                    "k_weight": names[1],
                    "cos": spread.format(cos),
                    "sin": spread.format(sin),
                }
                for (eps, value), offset in itertools.product(epsilons(module, q), ("0.0", "1.0")):
                    if offset == "1.0" and not weights:
                        continue
                    arguments = {**given, "eps": eps, "offset": offset}
                    yield Hypothesis(_OP, arguments, "(result[0], result[1])", scales=(value**0.5, value))

    def regions(self, graph: Graph) -> Iterator[Region]:
        norms: dict[Node, Region] = {}
        rotations: list[Region] = []
        for region in known_regions(graph):
            if "rms_norm" in region.ops:
                norms.setdefault(region.outputs[0], region)
            elif "rope" in region.ops and len(region.inputs) == 4:
                rotations.append(region)
        for rotation in rotations:
            q, k = (_normed(node, norms) for node in rotation.inputs[:2])
            if q is None or k is None or len(q.weights) != len(k.weights) or len(q.weights) > 1:
                continue
            weights = {
                f"{name}.weight": node
                for name, norm in (("q", q), ("k", k))
                for node in norm.weights.values()
            }
            inputs = (q.inputs[0], k.inputs[0], *rotation.inputs[2:])
            attributes = {**k.attributes, **q.attributes}
            parts = frozenset({"rope", "rms_norm"})
            yield Region(rotation.outputs, inputs, weights, attributes, ops=frozenset({_OP}), parts=parts)


def _normed(node: Any, norms: Mapping[Node, Region]) -> Region | None:
    """The norm that ``node`` comes from, if nothing else needs it on the way."""
    while isinstance(node, Node) and node not in norms and base_name(node) in _LAYOUT:
        node = node.args[0]
    return norms.get(node)


def _turns(given: Seen, result: Seen) -> Iterator[str]:
    (_, one, other, _), shape = given.shape, tuple(result.shape)
    if shape[1:3] == (other, one):
        yield "{}.transpose(1, 2)"
    if shape[1:3] == (one, other):
        yield "{}"


def _spreads(table: Seen) -> list[str]:
    return {2: ["{}.unsqueeze(0)"], 3: ["{}"], 4: ["{}[:, 0]", "{}[:, :, 0]"]}.get(len(table.shape), [])
