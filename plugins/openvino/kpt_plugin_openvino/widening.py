"""Graphs in bfloat16, written anew in float32: what OpenVINO computes them in is then a property of its own.

Of a graph in bfloat16 OpenVINO folds neither norms nor biases nor sums into convolutions: ResNet-50 had 54
reshapes and 12 passes over memory of their own beside its 54 products, and has one reshape in float32.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

#: Methods that name a dtype, in both.
_METHODS = {"bfloat16": "float"}
#: Methods that take a dtype for something else than a cast, or by its name.
_OTHERWISE = ("view", "type")


def widened(
    graph: torch.fx.GraphModule, fixed: Mapping[int, torch.Tensor]
) -> tuple[torch.fx.GraphModule, dict[int, torch.Tensor]] | None:
    """``graph`` and its weights with float32 wherever they have bfloat16; None where it has modules or graphs
    inside, or reads the bits of bfloat16 as something else.

    Inputs and outputs keep their dtypes and are cast in the graph: torch's threads, which wait for more work
    once they have cast a picture, would take the cores from OpenVINO's. The weights in float32 are copies.
    """
    if any(isinstance(part, torch.fx.GraphModule) for part in graph.modules() if part is not graph):
        return None
    if any(_other(node) for node in graph.graph.nodes):
        return None
    result = torch.fx.GraphModule(graph, copy.deepcopy(graph.graph))
    for number, node in enumerate(list(result.graph.nodes)):
        node.args, node.kwargs = _renamed(node.args), _renamed(node.kwargs)
        if node.op == "call_method":
            node.target = _METHODS.get(node.target, node.target)
        elif node.op == "placeholder":
            value = node.meta.get("example_value")
            if number not in fixed and isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16:
                with result.graph.inserting_after(node):
                    cast = result.graph.call_method("float", (node,))
                node.replace_all_uses_with(cast)
                cast.args = (node,)
        elif node.op == "output":
            with result.graph.inserting_before(node):
                node.args = torch.fx.node.map_arg(node.args, functools.partial(_narrowed, result.graph))
        elif node.op == "get_attr":
            value = operator.attrgetter(node.target)(graph)
            if isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16:
                node.target = f"_wide_{number}"
                result.register_buffer(node.target, value.detach().float())
    result.recompile()
    weights = {
        place: value.float() if value.dtype is torch.bfloat16 else value for place, value in fixed.items()
    }
    return result, weights


def _narrowed(graph: torch.fx.Graph, output: torch.fx.Node) -> torch.fx.Node:
    value = output.meta.get("example_value")
    narrow = isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16
    return graph.call_method("bfloat16", (output,)) if narrow else output


def _other(node: torch.fx.Node) -> bool:
    """Whether what ``node`` does depends on bfloat16 in a way that a change of names would not keep."""
    if node.op == "call_module":
        return True
    named = [value for value in node.args[1:] if isinstance(value, torch.dtype | str)]
    return node.op == "call_method" and node.target in _OTHERWISE and bool(named or node.kwargs)


def _renamed(arguments: Any) -> Any:
    return pytree.tree_map(lambda leaf: torch.float32 if leaf is torch.bfloat16 else leaf, arguments)
