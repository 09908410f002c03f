"""Recognises add_layer_norm: the norm of a sum, also where one addend is a linear layer's output."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from kpt.ops import Hypothesis
from kpt.ops.captured import Seen
from kpt.ops.hypotheses import attribute, own_parameters
from kpt.ops.regions import Region
from kpt.ops.regions import regions as known_regions
from kpt_plugin_triton.recognisers.candidates import inner_epsilons, pairs

if TYPE_CHECKING:
    from torch.fx import Graph

    from kpt.ops.captured import Captured

_OP = "add_layer_norm"
#: What the function returns, and what may be left of it.
_RESULTS = ("(result[0], result[1])", "(result[1], result[0])")


class AddLayerNorms:
    """Proposes add_layer_norm for a module with two tensors in: a residual, and what a sublayer made."""

    marks: Mapping[str, tuple[str, ...]] = {_OP: ("layer_norm", "native_layer_norm", "rsqrt", "sqrt", "pow")}

    def hypotheses(self, module: torch.nn.Module, captured: Captured) -> Iterator[Hypothesis]:
        tensors, parameters = captured.tensors(), own_parameters(module)
        if len(tensors) != 2 or len(parameters) > 4:
            return
        outputs = captured.output if type(captured.output) is tuple else (captured.output,)
        if len(outputs) > 2 or not all(isinstance(item, Seen) for item in outputs):
            return
        results = ("result[0]",) if isinstance(captured.output, Seen) else _RESULTS
        shape = outputs[0].shape
        if not shape or any(item.shape != shape for item in outputs):
            return
        for (x, seen), (residual, other) in itertools.permutations(tensors.items()):
            if other.shape != shape:
                continue
            for given, names in _addends(x, seen, shape, parameters):
                for (eps, value), affine in itertools.product(inner_epsilons(module, residual), pairs(names)):
                    arguments = {"x": given, "residual": residual, **affine, "eps": eps}
                    for result in results:
                        yield Hypothesis(_OP, arguments, result, scales=(value**0.5, value))
            if seen.shape == shape and not any(value.dim() == 2 for value in parameters.values()):
                return  # a sum: the other order is the same

    def regions(self, graph: Graph) -> Iterator[Region]:
        """Each layer norm whose input is a sum, with the addition; of its two results what is needed."""
        for norm in known_regions(graph):
            if "layer_norm" not in norm.ops:
                continue
            total, end = norm.inputs[0], norm.outputs[0]
            addends = [node for node in total.all_input_nodes if node in total.args]
            if total.op not in ("call_function", "call_method") or len(addends) != 2:
                continue
            inside = {*(norm.nodes() or ()), total}
            alone = all(user in inside for user in total.users)
            outputs = (end,) if alone else (end, total)
            yield Region(
                outputs,
                (addends[0], addends[1]),
                norm.weights,
                norm.attributes,
                ops=frozenset({_OP}),
                parts=frozenset({"layer_norm"}),
            )


def _addends(
    x: str, seen: Seen, shape: tuple[int, ...], parameters: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, list[str]]]:
    """What is added to the residual (``x``, or its product with a matrix), and the vectors of the norm."""
    vectors = [name for name, value in parameters.items() if value.shape == shape[-1:]]
    matrices = [name for name in parameters if name not in vectors]
    if not matrices and seen.shape == shape and len(vectors) <= 2:
        yield x, vectors
    if len(matrices) != 1 or parameters[matrices[0]].dim() != 2 or seen.shape[:-1] != shape[:-1]:
        return
    owner = matrices[0].rpartition(".")[0]
    biases = [name for name in vectors if name.rpartition(".")[0] == owner]
    rest = [name for name in vectors if name not in biases]
    if len(biases) > 1 or len(rest) > 2:
        return
    given = "".join(f", {attribute(name)}" for name in biases)
    size, weight = tuple(parameters[matrices[0]].shape), attribute(matrices[0])
    if size == (shape[-1], seen.shape[-1]):
        yield f"torch.nn.functional.linear({x}, {weight}{given})", rest
    if size == (seen.shape[-1], shape[-1]):
        yield f"torch.nn.functional.linear({x}, {weight}.t(){given})", rest
