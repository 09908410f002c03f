"""Weights of linears packed for oneDNN beforehand, and handed to compiled code as inputs.

Inductor packs weights that are constants of its code. Where one piece of code serves many layers they are
none, and it takes no packed tensor for anything but a constant: so the products are operations of our own
there, of which it sees the shapes alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from kpt_plugin_cpu import int8_linear  # noqa: F401 - registers kpt_cpu::pack_int8

_library = torch.library.Library("kpt_cpu", "FRAGMENT")
# Neither goes through `torch.library.custom_op`: what that checks in Python takes longer than small products.
_library.define("packed_linear(Tensor input, Tensor packed, Tensor? bias) -> Tensor")
_library.define(
    "packed_int8_product(Tensor codes, Tensor one, Tensor zero_point, Tensor packed, Tensor scale, "
    "Tensor weight_zero_points, ScalarType dtype) -> Tensor"
)


def _linear(input: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise.default(input, packed, bias, "none", [], "")
    return result


def _int8_product(
    codes: Tensor,
    one: Tensor,
    zero_point: Tensor,
    packed: Tensor,
    scale: Tensor,
    weight_zero_points: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    result: Tensor = torch.ops.onednn.qlinear_pointwise.tensor(
        codes, one, zero_point, packed, scale, weight_zero_points, None, 1.0, 0, dtype, "none", [], ""
    )
    return result


# Packed tensors are of another backend than what they are multiplied with: these serve both.
_library.impl("packed_linear", _linear, "CompositeExplicitAutograd")
_library.impl("packed_int8_product", _int8_product, "CompositeExplicitAutograd")


@torch.library.register_fake("kpt_cpu::packed_linear", lib=_library)
def _(input: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty((*input.shape[:-1], packed.shape[0]))


@torch.library.register_fake("kpt_cpu::packed_int8_product", lib=_library)
def _(codes: Tensor, *others: Any) -> Tensor:
    return codes.new_empty((codes.shape[0], others[2].shape[1]), dtype=others[-1])


_LINEAR = (torch.nn.functional.linear, torch._C._nn.linear)


class PackedWeights:
    """A graph pass that packs the weights of linears, [N, K], once; ``packed`` holds the copies.

    Packed are bfloat16 weights and, with ``float32``, those in float32; int8 weights are those of
    `Int8Linear`. A weight counts as one where it belongs to the model, not to the call.
    """

    def __init__(self, *, float32: bool = True) -> None:
        self.dtypes = {torch.bfloat16, torch.float32} if float32 else {torch.bfloat16}
        self.packed: list[Tensor] = []

    def __call__(self, graph: fx.GraphModule, example_inputs: list[Any]) -> fx.GraphModule:
        places = graph.graph.find_nodes(op="placeholder")
        weights = {
            node: value
            for node, value in zip(places, example_inputs, strict=True)
            if isinstance(value, Tensor) and _of_the_model(node, value)
        }
        for node in list(graph.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in _LINEAR:
                self._pack_linear(graph, node, weights)
            elif node.target is torch.ops.onednn.qlinear_pointwise.tensor:
                self._pack_int8(graph, node, weights)
        graph.graph.lint()
        graph.recompile()
        return graph

    def clear(self) -> None:
        """Let go of the copies; what was compiled with them is not to be called any more."""
        self.packed.clear()

    def _pack_linear(self, graph: fx.GraphModule, node: fx.Node, weights: dict[fx.Node, Tensor]) -> None:
        arguments = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
        weight = weights.get(arguments["weight"])
        if weight is None or weight.dtype not in self.dtypes or weight.dim() != 2 or not weight.numel():
            return
        rows = node.meta["example_value"].numel() // weight.shape[0]
        packed = torch.ops.mkldnn._reorder_linear_weight(
            weight.detach().contiguous(), rows if isinstance(rows, int) else None
        )
        constant = self._constant(graph, node, packed, arguments["weight"].meta)
        call = (arguments["input"], constant, arguments.get("bias"))
        _replace(graph, node, torch.ops.kpt_cpu.packed_linear.default, call)

    def _pack_int8(self, graph: fx.GraphModule, node: fx.Node, weights: dict[fx.Node, Tensor]) -> None:
        codes, one, zero_point, packing, scale, weight_zero_points = node.args[:6]
        packs = (torch.ops.kpt_cpu.pack_int8, torch.ops.kpt_cpu.pack_int8.default)
        if packing.target not in packs or packing.args[0] not in weights:
            return
        packed = torch.ops.kpt_cpu.pack_int8(weights[packing.args[0]])
        constant = self._constant(graph, node, packed, packing.meta)
        call = (codes, one, zero_point, constant, scale, weight_zero_points, node.args[9])
        _replace(graph, node, torch.ops.kpt_cpu.packed_int8_product.default, call)
        if not packing.users:
            graph.graph.erase_node(packing)

    def _constant(
        self, graph: fx.GraphModule, before: fx.Node, packed: Tensor, meta: dict[str, Any]
    ) -> fx.Node:
        name = f"packed_{len(self.packed)}"
        self.packed.append(packed)
        graph.__dict__[name] = packed
        with graph.graph.inserting_before(before):
            node = graph.graph.create_node("get_attr", name)
        node.meta = {"example_value": meta["example_value"]}
        return node


def _replace(graph: fx.GraphModule, node: fx.Node, target: Any, arguments: tuple[Any, ...]) -> None:
    with graph.graph.inserting_before(node):
        call = graph.graph.call_function(target, arguments)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    graph.graph.erase_node(node)


def _of_the_model(node: fx.Node, value: Tensor) -> bool:
    """Whether an input of the graph is a tensor of the model: it comes from no argument of the call."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return isinstance(value, torch.nn.Parameter)
    name = source.name if isinstance(source.name, str) else source.name()
    return not name.startswith(("L['args']", "L['kwargs']"))
