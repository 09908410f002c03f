"""What the operations of a captured graph write to, and which of them must therefore stay in one part."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

#: Functions that switch a mode of torch's, by how their names begin, or by a part of their names.
_SWITCHES = ("_set_", "_enter_", "_exit_", "set_", "_saved_tensors_hooks", "_sdpa_kernel")
_LEVELS = ("increment_nesting", "decrement_nesting", "batch_dim")
#: Python's operators that write to their first operand.
_WRITING = {
    *("setitem", "delitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift", "iconcat"),
}
#: Tensors whose memory is that of their storage.
_PLAIN = (torch.Tensor, torch.nn.Parameter, torch._subclasses.FakeTensor)
#: Methods that change the shape or the strides of what they are called on.
_RESHAPING = {
    *("t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_", "as_strided_"),
    *("resize_", "resize_as_", "set_", "rename_"),
}


def unbroken(nodes: list[fx.Node]) -> list[tuple[int, int]]:
    """The ranges (start, end) of ``nodes`` that have to stay in one part each.

    A write is in one part with all that has the same memory before it, back to the operation that made it:
    what comes after that part sees the tensor as it ends. Memory that an input of the graph has, switches of
    modes and what addresses memory from its beginning are in one part with all that comes before them.
    """
    made = _origins(nodes)
    ranges = []
    for number, node in enumerate(nodes):
        written = written_by(node)
        if _reshapes_in_place(node):  # shapes and strides are then not what was recorded
            return [(0, len(nodes))]
        if _switches(node) or "as_strided" in _name(node):
            ranges.append((0, number + 1))
        elif written:
            ranges.append((min(_origin(argument, made) for argument in written), number + 1))
        elif not node.users and value_of(node) is None:
            ranges.append((0, number + 1))
    return ranges


def _origins(nodes: list[fx.Node]) -> dict[Any, int]:
    """Where each memory was made, by its address; empty where that is not known of every value.

    What inputs and constants of the graph have was there before all operations.
    """
    places = {node: number for number, node in enumerate(nodes)}
    made: dict[Any, int] = {}
    for node in nodes[0].graph.nodes if nodes else ():
        own = memories(node)
        if own is None and node.users and (node in places or node.op == "placeholder"):
            return {}
        for memory in own or ():
            made.setdefault(memory, places.get(node, 0))
    return made


def _origin(written: Any, made: dict[Any, int]) -> int:
    own = memories(written) if isinstance(written, fx.Node) and written.op != "get_attr" else None
    return min((made.get(memory, 0) for memory in own or ()), default=0)


def memories(node: fx.Node) -> list[int] | None:
    """The addresses of what ``node`` yields, or None where they are not known."""
    value = value_of(node)
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    if value is None or any(x.layout is not torch.strided or type(x) not in _PLAIN for x in tensors):
        return None
    try:
        return [x.untyped_storage()._cdata for x in tensors]
    except NotImplementedError:  # inside a transform
        return None


def _reshapes_in_place(node: fx.Node) -> bool:
    return _name(node) in _RESHAPING and node.op != "call_module"


def _switches(node: fx.Node) -> bool:
    name = _name(node)
    return node.op == "call_function" and (
        name.startswith(_SWITCHES) or any(part in name for part in _LEVELS)
    )


def written_by(node: fx.Node) -> list[Any]:
    """The arguments that ``node`` may write to; all of them where that is not known."""
    everything = list(node.all_input_nodes) or [None]
    target, name = node.target, _name(node)
    if node.op == "call_module" or node.kwargs.get("out") is not None:
        return everything
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        overloads = [target] if isinstance(target, torch._ops.OpOverload) else _overloads(target)
        return everything if any(each._schema.is_mutable for each in overloads) else []
    if isinstance(target, torch._ops.HigherOrderOperator):
        bodies = [body for body in map(_body, node.all_input_nodes) if body is not None]
        inner = [each for body in bodies for each in body.graph.nodes if each.op.startswith("call_")]
        kept = (_switches(each) or written_by(each) or "as_strided" in _name(each) for each in inner)
        return everything if not bodies or any(kept) else []
    if name.strip("_") in _WRITING:  # sizes are added up this way, too
        first = value_of(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        return [] if isinstance(first, (int, torch.SymInt)) else list(node.args[:1])
    if getattr(target, "__module__", "") == "_operator":  # `and_`, `is_` and the like write nothing
        return []
    named = _named_arguments(node)
    if named.get("inplace") is True:
        return list(node.args[:1]) or everything
    if name in ("batch_norm", "instance_norm"):  # which move running statistics, one of them by default
        using = named.get("training") is True or named.get("use_input_stats") is True or True in _flags(node)
        default = name == "instance_norm" and "use_input_stats" not in named and not _flags(node)
        return everything if using or default else []
    if name in ("embedding", "embedding_bag") and named.get("max_norm") is not None:
        return everything
    return list(node.args[:1]) or everything if name.endswith("_") and not name.endswith("__") else []


def _flags(node: fx.Node) -> list[bool]:
    return [value for value in node.args if isinstance(value, bool)]


def _overloads(packet: Any) -> list[Any]:
    return [getattr(packet, name) for name in packet.overloads()]


def _body(node: fx.Node) -> fx.GraphModule | None:
    """The graph that an operator is given as an argument, or None."""
    owner = node.graph.owning_module
    value = (
        operator.attrgetter(str(node.target))(owner) if node.op == "get_attr" and owner is not None else None
    )
    return value if isinstance(value, fx.GraphModule) else None


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", ""))


def _named_arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by name, as far as the names of those passed by position are known."""
    code = getattr(node.target, "__code__", None)
    names = code.co_varnames[: code.co_argcount] if code is not None else ()
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def value_of(node: fx.Node) -> Any:
    """The fake value that was recorded of ``node``, or None."""
    return node.meta.get("example_value", node.meta.get("val"))
