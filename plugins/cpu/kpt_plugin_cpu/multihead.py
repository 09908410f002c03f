"""What `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` are in a captured graph: one operation each.

No compiler sees into them. Eager's fused attention is not captured; the one that is multiplies a transposed
input batch by batch with copies of the weights, and keeps its two products, and the attention between them,
from whoever packs weights or has a better attention. So whole layers, and self-attention without masks, are
written out, and other inputs that are not contiguous are copied first, as are those of linears.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._prims_common import is_contiguous_or_false
from torch._subclasses import FakeTensor
from torch.nn import functional

from kpt.compiling import value_of

_ATTENTION = functional.multi_head_attention_forward
_LAYER = torch._transformer_encoder_layer_fwd
_LINEAR = (functional.linear, torch._C._nn.linear)
#: By the kind of a layer's mask (of pairs, of keys, of both), what makes it one of [B, H, T, T].
_AXES: dict[Any, tuple[Any, ...]] = {0: (), 1: (slice(None), None, None), 2: ()}
_SIGNATURE = inspect.signature(_ATTENTION)


def written_out(graph: fx.GraphModule, example_inputs: list[Any]) -> fx.GraphModule:
    """``graph`` with its multi-head attention written out; a graph pass of compiled forwards."""
    changed = False
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is _ATTENTION and (given := _plain(node)) is not None:
            _write_out(graph.graph, node, given)
            changed = True
        elif node.target is _LAYER:
            changed |= _write_out_layer(graph.graph, node)
        elif node.target is _ATTENTION or node.target in _LINEAR:
            changed |= _made_contiguous(graph.graph, node, 3 if node.target is _ATTENTION else 1)
    if changed:
        graph.graph.lint()
        graph.recompile()
    return graph


def _plain(node: fx.Node) -> dict[str, Any] | None:
    """The arguments of self-attention that is nothing but that, or None."""
    bound = _SIGNATURE.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    given = bound.arguments
    query, value = given["query"], value_of(given["query"])
    unused = ("bias_k", "bias_v", "static_k", "static_v", "key_padding_mask", "attn_mask")
    causal = bool(given["is_causal"])
    simple = (
        query is given["key"] is given["value"]
        and isinstance(value, FakeTensor)
        and value.dim() == 3
        and not given["need_weights"]
        and not given["add_zero_attn"]
        and not given["use_separate_proj_weight"]
        and not (given["training"] and given["dropout_p"])
        # A causal mask comes as a tensor too, which is not looked at then.
        and all(given[name] is None for name in unused if not (causal and name == "attn_mask"))
        and all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)
    )
    return given if simple else None


class _Writer:
    """Adds calls to a graph, with the fake values that they yield."""

    def __init__(self, graph: fx.Graph, mode: Any) -> None:
        self.graph, self.mode = graph, mode

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        values, named = fx.map_arg((args, kwargs), value_of)
        with self.mode:
            node.meta["example_value"] = target(*values, **named)
        return node

    def attention(
        self, x: fx.Node, heads: int, weights: list[Any], order: tuple[int, ...], **masks: Any
    ) -> fx.Node:
        """Self-attention of ``x`` [*, *, E]; ``order`` takes its axes, the last split, to [B, H, T, D].

        ``masks``: ``attn_mask`` or ``is_causal`` of the attention.
        """
        projected = self.call(functional.linear, x, *weights[:2])
        parts = self.call(torch.chunk, projected, 3, -1)
        each = (self.call(operator.getitem, parts, number) for number in range(3))
        split = (self.call(torch.unflatten, part, -1, (heads, -1)) for part in each)
        states = [self.call(torch.permute, part, order) for part in split]
        mixed = self.call(functional.scaled_dot_product_attention, *states, **masks)
        back = tuple(order.index(axis) for axis in range(4))
        joined = self.call(torch.flatten, self.call(torch.permute, mixed, back), 2)
        return self.call(functional.linear, joined, *weights[2:])


def _write_out(graph: fx.Graph, node: fx.Node, given: dict[str, Any]) -> None:
    """Shapes [T, B, E], as the operation has them: what it yields has the same strides."""
    names = ("in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias")
    writer = _Writer(graph, value_of(given["query"]).fake_mode)
    with graph.inserting_before(node):
        x = writer.call(torch.Tensor.contiguous, given["query"])
        weights = [given[name] for name in names]
        causal = bool(given["is_causal"])
        output = writer.attention(x, given["num_heads"], weights, (1, 2, 0, 3), is_causal=causal)
    for user in list(node.users):
        user.replace_all_uses_with(output)
        graph.erase_node(user)
    graph.erase_node(node)


def _write_out_layer(graph: fx.Graph, node: fx.Node) -> bool:
    """Whether eager's fused layer of a `nn.TransformerEncoder` was written out."""
    if node.kwargs or len(node.args) < 18:
        return False
    mask, kind = (*node.args[18:], None, None)[:2]
    if mask is not None and kind not in _AXES:
        return False
    x, _, heads, *weights = node.args[:7]
    gelu, norm_first, eps, *others = node.args[7:18]
    value = value_of(x) if isinstance(x, fx.Node) else None
    if not isinstance(value, FakeTensor) or value.dim() != 3 or value.is_nested:
        return False
    writer = _Writer(graph, value.fake_mode)
    call, width = writer.call, value.shape[-1]

    def norm(hidden: fx.Node, which: int) -> fx.Node:
        return call(functional.layer_norm, hidden, (width,), *others[2 * which : 2 * which + 2], eps)

    def mixed(hidden: fx.Node) -> fx.Node:
        return writer.attention(hidden, heads, weights, (0, 2, 1, 3), **masks)

    def wide(hidden: fx.Node) -> fx.Node:
        inner = call(functional.linear, hidden, *others[4:6])
        return call(
            functional.linear, call(functional.gelu if gelu else functional.relu, inner), *others[6:8]
        )

    with graph.inserting_before(node):
        masks: dict[str, Any] = {}
        if mask is not None:
            # The operation leaves out what is not zero, -inf among it; of a row without a key it makes NaN.
            kept = call(torch.logical_not, mask)
            masks["attn_mask"] = call(operator.getitem, kept, _AXES[kind]) if _AXES[kind] else kept
        hidden = x
        for number, branch in enumerate((mixed, wide)):
            if norm_first:
                hidden = call(torch.add, hidden, branch(norm(hidden, number)))
            else:
                hidden = norm(call(torch.add, hidden, branch(hidden)), number)
    node.replace_all_uses_with(hidden)
    graph.erase_node(node)
    return True


def _made_contiguous(graph: fx.Graph, node: fx.Node, count: int) -> bool:
    """Whether one of the first ``count`` arguments was replaced by a contiguous copy."""
    copies: dict[fx.Node, fx.Node] = {}
    for argument in node.args[:count]:
        value = value_of(argument) if isinstance(argument, fx.Node) else None
        if not isinstance(value, FakeTensor) or value.dim() < 3 or value.layout is not torch.strided:
            continue
        if argument not in copies and not is_contiguous_or_false(value):
            with graph.inserting_before(node):
                copies[argument] = graph.call_method("contiguous", (argument,))
            with value.fake_mode:
                copies[argument].meta["example_value"] = value.contiguous()
    if copies:
        node.args = tuple(
            copies.get(argument, argument) if isinstance(argument, fx.Node) else argument
            for argument in node.args
        )
    return bool(copies)
