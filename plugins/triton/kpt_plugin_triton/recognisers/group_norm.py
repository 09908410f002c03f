"""Recognises group_norm: modules, ``F.group_norm`` in a forward, and both with a silu behind them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, cast

import torch

from kpt.ops import Hypothesis
from kpt.ops.hypotheses import (
    integers_written,
    is_region,
    names_read,
    only_tensor,
    own_parameters,
)
from kpt.ops.regions import Region, argument, base_name
from kpt_plugin_triton.recognisers.candidates import inner_attributes, inner_epsilons, pairs

if TYPE_CHECKING:
    from torch.fx import Graph, Node

    from kpt.ops.captured import Captured

_OP = "group_norm"
#: What code without a call of its own name for it needs to bring groups into rows.
_RESHAPES = frozenset({"group_norm", "reshape", "view", "unflatten"})


class GroupNorms:
    """Proposes group_norm for a module or function with one tensor in and one of its shape out."""

    marks: Mapping[str, tuple[str, ...]] = {_OP: ("group_norm", "native_group_norm")}

    def hypotheses(self, module: torch.nn.Module, captured: Captured) -> Iterator[Hypothesis]:
        found = only_tensor(captured)
        if found is None or getattr(captured.output, "shape", None) != found[1].shape:
            return
        x, seen = found
        vectors = own_parameters(module)
        if len(seen.shape) < 2 or not seen.dtype.is_floating_point or len(vectors) > 2:
            return
        if any(tuple(value.shape) != (seen.shape[1],) for value in vectors.values()):
            return
        groups = _groups(module, seen.shape)
        if not groups:
            return
        silu = ({}, {"activation": "'silu'"}) if _may_activate(module) else ({},)
        for text, (eps, value) in itertools.product(groups, inner_epsilons(module, x)):
            for affine, activation in itertools.product(pairs(vectors), silu):
                arguments = {"x": x, "groups": text, **affine, "eps": eps, **activation}
                yield Hypothesis(_OP, arguments, scales=(value**0.5, value))

    def function_hypotheses(self, module: torch.nn.Module, captured: Captured) -> Iterator[Hypothesis]:
        call, tensors = captured.calls[0], captured.tensors()
        affine: dict[str, str] = {name: name for name in ("weight", "bias") if name in tensors}
        given = [name for name in tensors if name not in affine]
        groups = [name for name, value in call.items() if "group" in name and type(value) is int]
        if len(given) != 1 or len(groups) != 1 or type(call.get("eps")) is not float:
            return
        if getattr(captured.output, "shape", None) == tensors[given[0]].shape:
            scales = (call["eps"] ** 0.5, call["eps"])
            fixed = {"x": given[0], "groups": groups[0], "eps": "eps"}
            yield Hypothesis(_OP, {**fixed, **affine}, scales=scales)

    def regions(self, graph: Graph) -> Iterator[Region]:
        for node in graph.nodes:
            if node.op != "call_function" or base_name(node) != "group_norm":
                continue
            for user in node.users:
                if base_name(user) == "silu" and len(node.users) == 1:
                    yield from _named(node, user)
            yield from _named(node, node)


def _named(norm: Node, end: Node) -> Iterator[Region]:
    """``F.group_norm(x, groups, weight, bias, eps)`` up to ``end``."""
    given = [
        argument(norm, i, name) for i, name in enumerate(("input", "num_groups", "weight", "bias", "eps"))
    ]
    x, groups, weight, bias, eps = given
    if x is None or type(groups) is not int:
        return
    weights = {name: node for name, node in (("weight", weight), ("bias", bias)) if node is not None}
    options = {"num_groups": groups, "eps": 1e-5 if eps is None else eps}
    yield Region((end,), (x,), weights, options, ops=frozenset({_OP}))


def _groups(module: torch.nn.Module, shape: tuple[int, ...]) -> list[str]:
    """Expressions for the number of groups, one for each value that could be it."""
    channels, read = shape[1], names_read(module)
    found: dict[int, str] = {}
    for name, value in vars(module).items():
        if "group" in name and name in read and type(value) is int:
            found.setdefault(value, f"self.{name}")
    for text, value in inner_attributes(module, "group", int).items():
        found.setdefault(cast("int", value), text)
    if read & _RESHAPES:
        for value in integers_written(module):
            if value > 1:
                found.setdefault(value, repr(value))
    # One group of a matrix is a layer norm, which other kernels serve.
    return [
        text
        for value, text in found.items()
        if value > 0 and channels % value == 0 and (value > 1 or len(shape) > 2)
    ]


def _may_activate(module: torch.nn.Module) -> bool:
    names = names_read(module) | {type(child).__name__.lower() for child in module.modules()}
    return is_region(module) or bool(names & {"silu", "sigmoid", "swish"})
