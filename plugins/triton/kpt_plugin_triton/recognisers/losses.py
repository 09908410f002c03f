"""Recognises linear_cross_entropy: a head and its loss, where nothing else needs the logits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from kpt.ops import Hypothesis
from kpt.ops.captured import Seen
from kpt.ops.hypotheses import attribute, is_region, numbers_written, own_parameters
from kpt.ops.regions import Region, argument, base_name

if TYPE_CHECKING:
    from torch.fx import Graph

    from kpt.ops.captured import Captured

_OP = "linear_cross_entropy"
_OPTIONS = ("ignore_index", "label_smoothing", "reduction")
#: What may be done to logits before the loss: other shapes and dtypes, all but the last token, a soft cap.
_ON_THE_WAY = frozenset(
    """
    view reshape flatten float to contiguous getitem tanh div truediv mul transpose permute
    """.split()
)


class LinearLosses:
    """Proposes linear_cross_entropy for hidden states, a matrix of classes and integer targets."""

    marks: Mapping[str, tuple[str, ...]] = {_OP: ("cross_entropy_loss", "log_softmax")}

    def hypotheses(self, module: torch.nn.Module, captured: Captured) -> Iterator[Hypothesis]:
        tensors, parameters, output = captured.tensors(), own_parameters(module), captured.output
        states = [n for n, t in tensors.items() if t.dtype.is_floating_point and len(t.shape) in (2, 3)]
        labels = [n for n, t in tensors.items() if t.dtype == torch.int64]
        if len(tensors) != 2 or len(states) != 1 or len(labels) != 1 or not isinstance(output, Seen):
            return
        matrices = [name for name, value in parameters.items() if value.dim() == 2]
        vectors = [name for name, value in parameters.items() if value.dim() == 1]
        if len(matrices) != 1 or len(vectors) > 1 or len(parameters) != 1 + len(vectors) or output.shape:
            return
        (hidden,), (target,) = states, labels
        classes, features = parameters[matrices[0]].shape
        if tensors[hidden].shape[-1] != features:
            return
        held = vars(module)
        fixed = {"weight": attribute(matrices[0])}
        if vectors:
            fixed["bias"] = attribute(vectors[0])
        fixed |= {name: f"self.{name}" for name in _OPTIONS if name in held}
        ignored = fixed.get("ignore_index", "-100")
        caps: list[dict[str, str]] = [{}]
        caps += [{"softcap": repr(number)} for number in numbers_written(module) if number > 1.0]
        results = ("result", "result.float()")  # from logits that were cast to fp32
        for (states_, targets), cap in itertools.product(
            _rows(hidden, target, tensors, ignored, is_region(module)), caps
        ):
            for result in results:
                arguments = {"hidden": states_, "target": targets, **fixed, **cap}
                yield Hypothesis(_OP, arguments, result, integers={target: (0, classes)})

    def regions(self, graph: Graph) -> Iterator[Region]:
        for node in graph.nodes:
            if node.op != "call_function" or base_name(node) != "cross_entropy":
                continue
            logits, target = argument(node, 0, "input"), argument(node, 1, "target")
            head = _head(logits)
            weighed = argument(node, 2, "weight") is not None
            if head is None or weighed or not isinstance(target, Node):
                continue
            hidden, weight, bias = head.args[0], argument(head, 1, "weight"), argument(head, 2, "bias")
            if not isinstance(hidden, Node) or not isinstance(weight, Node):
                continue
            weights = {"head.weight": weight}
            if isinstance(bias, Node):
                weights["head.bias"] = bias
            places = {"ignore_index": 4, "reduction": 6, "label_smoothing": 7}
            given = {name: argument(node, place, name) for name, place in places.items()}
            options = {name: value for name, value in given.items() if value is not None}
            parts = frozenset({"cross_entropy", "linear"})
            yield Region((node,), (hidden, target), weights, options, ops=frozenset({_OP}), parts=parts)


def _head(logits: object) -> Node | None:
    """The linear layer that ``logits`` come from; None if anything besides the loss needs them."""
    node = logits
    while isinstance(node, Node) and len(node.users) == 1:
        if base_name(node) == "linear":
            return node
        if base_name(node) not in _ON_THE_WAY or len(node.all_input_nodes) != 1:
            return None
        node = node.all_input_nodes[0]
    return None


def _rows(
    hidden: str, target: str, tensors: Mapping[str, Seen], ignored: str, region: bool
) -> Iterator[tuple[str, str]]:
    """Which rows of the hidden states meet which targets."""
    states, labels = tensors[hidden].shape, tensors[target].shape
    flat, targets = f"{hidden}.flatten(0, -2)", f"{target}.flatten()"
    if states[:-1] == labels or labels == (states[0] * (states[1] if len(states) == 3 else 1),):
        yield (hidden, target) if len(states) == 2 else (flat, targets)
    if len(states) != 3:
        return
    shifted = f"{hidden}[:, :-1].flatten(0, -2)"
    if labels == states[:-1]:
        yield flat, f"torch.nn.functional.pad({target}, (0, 1), value={ignored})[..., 1:].flatten()"
        yield shifted, f"{target}[:, 1:].flatten()"
    if region and labels in ((states[0] * (states[1] - 1),), (states[0], states[1] - 1)):
        yield shifted, targets
