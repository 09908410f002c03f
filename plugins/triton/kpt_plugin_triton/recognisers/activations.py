"""Recognises bias_activation (an activation, also behind a linear layer) and glu (a gated one)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from kpt.ops import Hypothesis
from kpt.ops.callees import codes_of
from kpt.ops.captured import Seen
from kpt.ops.hypotheses import attribute, is_region, names_read, only_tensor, own_parameters
from kpt.ops.references.mlp import ACTIVATIONS
from kpt.ops.regions import Region, argument, base_name, operands, shape, through

if TYPE_CHECKING:
    from torch.fx import Graph

    from kpt.ops.captured import Captured

_MARKS = ("gelu", "relu", "silu")
#: What code mentions that writes an activation out. One that calls PyTorch's own is a single kernel already.
_WRITTEN_OUT = frozenset({"erf", "exp", "pow", "sigmoid", "tanh"})
#: Parts of the names of activations, and of what holds one.
_WORDS = ("act", "erf", "glu", "relu", "sigmoid", "silu", "swish", "tanh", "gelu")
#: Between an activation and the product of a gated one there may be these.
_BETWEEN = frozenset({"dropout", "to", "float", "contiguous"})


class BiasActivations:
    """Proposes bias_activation for an activation that is written out, or one of a linear layer's output."""

    marks: Mapping[str, tuple[str, ...]] = {"bias_activation": _MARKS}

    def hypotheses(self, module: torch.nn.Module, captured: Captured) -> Iterator[Hypothesis]:
        found = only_tensor(captured)
        if found is None or not isinstance(captured.output, Seen) or not found[1].shape or _plain(module):
            return
        (x, seen), parameters = found, own_parameters(module)
        if not parameters and captured.output.shape == seen.shape and names_read(module) & _WRITTEN_OUT:
            yield from _each("bias_activation", {"x": x})
        elif len(parameters) == 1 and is_region(module) and captured.output.shape == seen.shape:
            (bias,) = parameters
            yield from _each("bias_activation", {"x": x, "bias": attribute(bias)})
        product = linear_of(x, seen.shape, parameters)
        if product is not None and captured.output.shape == (*seen.shape[:-1], product[2]):
            text, bias_text, _ = product
            bias_given = {} if bias_text is None else {"bias": bias_text}
            yield from _each("bias_activation", {"x": text, **bias_given})

    def regions(self, graph: Graph) -> Iterator[Region]:
        ops = frozenset({"bias_activation"})
        for node in graph.nodes:
            if not _is_activation(node) or not isinstance(node.args[0], Node):
                continue
            inner = node.args[0]
            if len(inner.users) != 1:
                continue
            if base_name(inner) == "linear":
                x, weight, bias = inner.args[0], argument(inner, 1, "weight"), argument(inner, 2, "bias")
                if isinstance(x, Node) and isinstance(weight, Node) and isinstance(bias, Node):
                    weights = {"linear.weight": weight, "linear.bias": bias}
                    yield Region((node,), (x,), weights, ops=ops, parts=frozenset({"linear"}))
            elif base_name(inner) in ("add", "iadd") and len(operands(inner)) == 2:
                one, other = operands(inner)
                for x, bias in ((one, other), (other, one)):
                    if bias.op in ("placeholder", "get_attr") and shape(bias) == (shape(x) or ())[-1:]:
                        yield Region((node,), (x,), {"bias": bias}, ops=ops)


class Glus:
    """Proposes glu for a gate and the values that it scales: two inputs, or the halves of one."""

    marks: Mapping[str, tuple[str, ...]] = {"glu": _MARKS}

    def hypotheses(self, module: torch.nn.Module, captured: Captured) -> Iterator[Hypothesis]:
        tensors, parameters = captured.tensors(), own_parameters(module)
        if not isinstance(captured.output, Seen) or _plain(module):
            return
        if not parameters:
            names = {*names_read(module), *(type(child).__name__ for child in module.modules())}
            if is_region(module) or _may_act(names):
                yield from _gates(captured)
        elif len(tensors) == 1:
            x, seen = next(iter(tensors.items()))
            product = linear_of(x, seen.shape, parameters)
            if product is None or captured.output.shape != (*seen.shape[:-1], product[2] // 2):
                return
            text, bias, _ = product
            weight = text.removesuffix(")")
            values = {"both": f"{weight})" if bias is None else f"{weight}, {bias})"}
            for gate, up in _halves("both"):
                yield from _each("glu", {"gate": gate, "up": up}, values)

    def function_hypotheses(self, module: torch.nn.Module, captured: Captured) -> Iterator[Hypothesis]:
        function = captured.function
        if isinstance(captured.output, Seen) and isinstance(function, FunctionType):
            if _may_act({name for code in codes_of(function) for name in code.co_names}):
                yield from _gates(captured)

    def regions(self, graph: Graph) -> Iterator[Region]:
        for node in graph.nodes:
            if base_name(node) not in ("mul", "imul") or node.op not in ("call_function", "call_method"):
                continue
            sides = operands(node)
            if len(sides) != 2 or shape(sides[0]) != shape(sides[1]):
                continue
            for acted, up in (sides, sides[::-1]):
                activation = through(acted, _BETWEEN)
                if isinstance(activation, Node) and _is_activation(activation):
                    gate: Any = activation.args[0]
                    if isinstance(gate, Node) and gate is not up and len(acted.users) == 1:
                        yield Region((node,), (gate, up), ops=frozenset({"glu"}))


def _may_act(names: Iterable[str]) -> bool:
    """Whether code that mentions ``names`` may call an activation; any sum of two would need a proof else."""
    return any(word in name.lower() for name in names for word in _WORDS)


def _gates(captured: Captured) -> Iterator[Hypothesis]:
    tensors = captured.tensors()
    out = captured.output.shape
    if any(not value.dtype.is_floating_point for value in tensors.values()):
        return
    if len(tensors) == 2 and all(value.shape == out for value in tensors.values()) and out:
        for gate, up in itertools.permutations(tensors):
            yield from _each("glu", {"gate": gate, "up": up})
    if len(tensors) == 1:
        x, seen = next(iter(tensors.items()))
        if seen.shape and (*seen.shape[:-1], seen.shape[-1] // 2) == out and seen.shape[-1] % 2 == 0:
            for gate, up in _halves(x):
                yield from _each("glu", {"gate": gate, "up": up})


def _halves(x: str) -> Iterator[tuple[str, str]]:
    for first, second in ((0, 1), (1, 0)):
        yield f"{x}.chunk(2, dim=-1)[{first}]", f"{x}.chunk(2, dim=-1)[{second}]"
    for first, second in ((0, 1), (1, 0)):  # side by side, as interleaved weights leave them
        yield f"{x}[..., {first}::2]", f"{x}[..., {second}::2]"


def _each(
    op: str, arguments: Mapping[str, str], values: Mapping[str, str] | None = None
) -> Iterator[Hypothesis]:
    for activation in ACTIVATIONS:
        yield Hypothesis(op, {**arguments, "activation": repr(activation)}, values=values or {})


def _plain(module: torch.nn.Module) -> bool:
    """Whether the module is one of PyTorch's own that is a single kernel already, such as ``nn.GELU``."""
    return type(module).__module__.startswith("torch.nn.") and not list(module.children())


def _is_activation(node: Node) -> bool:
    return node.op in ("call_function", "call_method") and base_name(node) in _MARKS


def linear_of(
    x: str, sizes: tuple[int, ...], parameters: Mapping[str, torch.Tensor]
) -> tuple[str, str | None, int] | None:
    """For one matrix and at most one vector: (the product with ``x``, the bias, features that come out)."""
    matrices = [name for name, value in parameters.items() if value.dim() == 2]
    vectors = [name for name, value in parameters.items() if value.dim() == 1]
    if len(matrices) != 1 or len(vectors) > 1 or len(parameters) != 1 + len(vectors) or not sizes:
        return None
    rows, columns = parameters[matrices[0]].shape
    weight = attribute(matrices[0])
    if columns != sizes[-1]:
        if rows != sizes[-1]:
            return None
        weight, rows = f"{weight}.t()", columns  # stored the other way round, as GPT-2 does
    if vectors and parameters[vectors[0]].numel() != rows:
        return None
    product = f"torch.nn.functional.linear({x}, {weight})"
    return product, attribute(vectors[0]) if vectors else None, rows
