"""Weights of linears packed for oneDNN beforehand, and handed to compiled code as inputs.

Inductor packs weights that are constants of its code. Where one piece of code serves many layers they are
none, and it takes no packed tensor for anything but a constant: so the products are operations of our own
there, of which it sees the shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from kpt.compiling import value_of, written_by
from kpt_plugin_cpu import int8_linear  # noqa: F401 - registers kpt_cpu::pack_int8

_library = torch.library.Library("kpt_cpu", "FRAGMENT")
# Neither goes through `torch.library.custom_op`: what that checks in Python takes longer than small products.
_library.define("packed_linear(Tensor input, Tensor packed, Tensor? bias) -> Tensor")
_library.define(
    "packed_int8_product(Tensor codes, Tensor one, Tensor zero_point, Tensor packed, Tensor scale, "
    "Tensor weight_zero_points, ScalarType dtype) -> Tensor"
)


def _linear(input: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    # oneDNN reads a bias without its strides.
    bias = bias.contiguous() if bias is not None else None
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

    With ``compiled`` the products are operations that inductor takes packed tensors for; else oneDNN's own,
    which cost less to call.

    Packed are bfloat16 weights, where oneDNN has products for them on this CPU, and, with ``float32``, those
    in float32; int8 weights are those of `Int8Linear`. A weight counts as one where it is a parameter, a
    buffer or a tensor attribute of a module of ``model``: writes to these are watched. What a graph itself
    writes to is left alone.
    """

    def __init__(self, model: torch.nn.Module, *, float32: bool = True, compiled: bool = True) -> None:
        self.model = model
        self.compiled = compiled
        self.dtypes = {torch.float32} if float32 else set()
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            self.dtypes.add(torch.bfloat16)
        self.packed: list[Tensor] = []
        self._known: dict[Any, tuple[Tensor, Tensor]] = {}

    def __call__(self, graph: fx.GraphModule, example_inputs: list[Any]) -> fx.GraphModule:
        places = graph.graph.find_nodes(op="placeholder")
        own, written = _tensors_of(self.model), _written(graph)
        weights = {
            node: value
            for node, value in zip(places, example_inputs, strict=True)
            if id(value) in own and node not in written and not of_the_call(node)
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
        self._known.clear()

    def _pack_linear(self, graph: fx.GraphModule, node: fx.Node, weights: dict[fx.Node, Tensor]) -> None:
        arguments = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
        weight, x, y = weights.get(arguments["weight"]), *map(value_of, (arguments["input"], node))
        if weight is None or weight.dtype not in self.dtypes or weight.dim() != 2 or not weight.numel():
            return
        if weight.device.type != "cpu" or not x.dtype == y.dtype == weight.dtype:  # autocast, say
            return
        bias = arguments.get("bias")
        if bias is not None and not _is_vector(value_of(bias), weight):
            return
        # Without a compiler one copy serves all graphs, whatever their number of rows.
        size = y.numel() // weight.shape[0] if self.compiled else None
        rows = size if isinstance(size, int) else None
        packed = self._once(
            weight, rows, lambda: torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
        )
        constant = self._constant(graph, node, packed, arguments["weight"].meta)
        call: tuple[Any, ...] = (arguments["input"], constant, bias)
        product = torch.ops.kpt_cpu.packed_linear.default
        if not self.compiled:
            if isinstance(bias, fx.Node):  # oneDNN reads it without strides, and it is the one of the moment
                with graph.graph.inserting_before(node):
                    whole = graph.graph.call_method("contiguous", (bias,))
                whole.meta = dict(bias.meta)
                call = (arguments["input"], constant, whole)
            call, product = (*call, "none", [], ""), torch.ops.mkldnn._linear_pointwise.default
        _replace(graph, node, product, call)

    def _pack_int8(self, graph: fx.GraphModule, node: fx.Node, weights: dict[fx.Node, Tensor]) -> None:
        if len(node.args) < 10:
            return
        codes, one, zero_point, packing, scale, weight_zero_points = node.args[:6]
        packs = (torch.ops.kpt_cpu.pack_int8, torch.ops.kpt_cpu.pack_int8.default)
        if packing.target not in packs or packing.args[0] not in weights:
            return
        weight = weights[packing.args[0]]
        packed = self._once(weight, None, lambda: torch.ops.kpt_cpu.pack_int8(weight))
        constant = self._constant(graph, node, packed, packing.meta)
        call = (codes, one, zero_point, constant, scale, weight_zero_points, node.args[9])
        _replace(graph, node, torch.ops.kpt_cpu.packed_int8_product.default, call)
        if not packing.users:
            graph.graph.erase_node(packing)

    def _once(self, weight: Tensor, rows: int | None, pack: Callable[[], Tensor]) -> Tensor:
        """What ``pack`` makes of ``weight`` as it is now, for so many ``rows``; the same for all graphs."""
        key = id(weight), _version(weight), rows
        if key not in self._known:
            self._known[key] = weight, pack()  # with the weight, so that no other gets its id
            self.packed.append(self._known[key][1])
        return self._known[key][1]

    def _constant(
        self, graph: fx.GraphModule, before: fx.Node, packed: Tensor, meta: dict[str, Any]
    ) -> fx.Node:
        name = f"packed_{sum(1 for _ in graph.graph.find_nodes(op='get_attr'))}"
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


def _is_vector(bias: Any, weight: Tensor) -> bool:
    """Whether ``bias`` has an element of its own for each row of ``weight``, as oneDNN takes it."""
    return isinstance(bias, Tensor) and bias.dtype == weight.dtype and tuple(bias.shape) == weight.shape[:1]


def _tensors_of(model: torch.nn.Module) -> set[int]:
    """Ids of the parameters, buffers and tensor attributes of all modules."""
    own = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        own += [value for value in vars(module).values() if isinstance(value, Tensor)]
    return {id(tensor) for tensor in own}


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _written(graph: fx.GraphModule) -> set[fx.Node]:
    """Inputs that nodes of ``graph`` may write to, themselves or through what is made of them first."""
    found: set[fx.Node] = set()
    for node in graph.graph.nodes:
        for argument in written_by(node) if node.op.startswith("call_") else ():
            while isinstance(argument, fx.Node):
                if argument.op == "placeholder":
                    found.add(argument)
                argument = argument.args[0] if argument.args else None
    return found


def of_the_call(node: fx.Node) -> bool:
    """Whether an input of the graph comes from an argument of the call, for all that is known."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    name = name if isinstance(name, str) else name()
    return not name or "L['args']" in name or "L['kwargs']" in name
