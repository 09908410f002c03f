"""A part of a captured graph as a graph of its own, and what tells whether two of them are the same."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

#: Functions that switch a mode of torch's, by how their names begin, or by a part of their names.
_SWITCHES = ("_set_", "_enter_", "_exit_", "set_", "_saved_tensors_hooks", "_sdpa_kernel")
_LEVELS = ("increment_nesting", "decrement_nesting", "batch_dim")
#: Python's operators that write to their first operand.
_WRITING = {
    *("setitem", "delitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift", "iconcat"),
}
#: Methods that change the shape or the strides of what they are called on.
_RESHAPING = {
    *("t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_", "as_strided_"),
    *("resize_", "resize_as_", "set_", "rename_"),
}


def reshapes_in_place(node: fx.Node) -> bool:
    """Whether ``node`` changes the shape or strides of a tensor, which are then not what was recorded."""
    return _name(node) in _RESHAPING and node.op != "call_module"


def keeps_together(node: fx.Node) -> bool:
    """Whether what is before ``node`` has to be in one part with it.

    It writes to a tensor, is there for its effect alone (such as switching a mode), or addresses the memory
    of its input from its beginning.
    """
    return _is_for_effect(node) or "as_strided" in _name(node) or bool(written_by(node))


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
        return everything if not bodies or any(keeps_together(each) for each in inner) else []
    if name.strip("_") in _WRITING:  # sizes are added up this way, too
        first = value_of(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        return [] if isinstance(first, (int, torch.SymInt)) else list(node.args[:1])
    if getattr(target, "__module__", "") == "_operator":  # `and_`, `is_` and the like write nothing
        return []
    named = _named_arguments(node)
    if named.get("inplace") is True:
        return list(node.args[:1]) or everything
    if name in ("batch_norm", "instance_norm"):  # which move running statistics
        using = named.get("training") is True or named.get("use_input_stats") is True or True in _flags(node)
        return everything if using else []
    if name in ("embedding", "embedding_bag") and named.get("max_norm") is not None:
        return everything
    return list(node.args[:1]) or everything if name.endswith("_") and not name.endswith("__") else []


def _is_for_effect(node: fx.Node) -> bool:
    name = _name(node)
    if node.op == "call_function" and (name.startswith(_SWITCHES) or any(part in name for part in _LEVELS)):
        return True
    return not node.users and value_of(node) is None


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


def signature(node: fx.Node) -> Any:
    """What ``node`` does, whatever it does it to: equal for the same operation of two blocks."""
    return (node.op, _target(node), _frozen(node.args, _any), _frozen(node.kwargs, _any), _meta(node))


class Part:
    """Consecutive ``nodes`` of a graph; the values that they need are its inputs, in the order of their use.

    ``inputs`` and ``outputs`` are nodes of the whole graph. Parts with equal ``key`` compute the same of
    their inputs. ``known`` are fake values of nodes that parts before yield, where they are not those that
    were recorded: graph passes exchange operations, and with them strides.
    """

    def __init__(self, owner: fx.GraphModule, nodes: list[fx.Node], known: dict[fx.Node, Any]) -> None:
        inside = set(nodes)
        needed = dict.fromkeys(d for node in nodes for d in node.all_input_nodes if d not in inside)
        bodies = [d for d in needed if d.op == "get_attr" and not _is_tensor(owner, d)]
        values = [d for d in needed if d not in bodies]
        sizes = _sizes(owner, [*values, *nodes])
        self.inputs = [*(size for size in sizes if size not in needed), *values]
        self.outputs = [node for node in nodes if any(user not in inside for user in node.users)]
        self.nodes = nodes
        self._owner = owner
        self.graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for number, node in enumerate(self.inputs):
            copies[node] = self.graph.placeholder(f"input_{number}")
            copies[node].meta = {"example_value": known[node]} if node in known else dict(node.meta)
        for node in [*bodies, *nodes]:
            copies[node] = self.graph.node_copy(node, copies.__getitem__)
        self.graph.output(tuple(copies[node] for node in self.outputs))
        self.key = self._key()

    def _key(self) -> Any:
        numbers = {node: number for number, node in enumerate(self.graph.nodes)}
        return tuple(
            (
                node.op,
                "" if node.op == "placeholder" else _target(node),
                () if node.op == "placeholder" else _frozen(node.args, numbers.__getitem__),
                _frozen(node.kwargs, numbers.__getitem__),
                "" if node.op == "output" else _meta(node),
            )
            for node in self.graph.nodes
        )

    def compiled_by(
        self, compile_part: Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]
    ) -> Callable[..., Any]:
        """What ``compile_part`` makes of the part and fake inputs, in a tracing context of its own.

        That of the whole graph knows which of its inputs are parameters.
        """
        with torch._guards.tracing(torch._guards.TracingContext(_fake_mode(self.graph))):
            return compile_part(fx.GraphModule(self._owner, self.graph), self._examples())

    def results(self) -> tuple[Any, ...]:
        """Fake values of the outputs."""
        mode = _fake_mode(self.graph)
        interpreter = fx.Interpreter(fx.GraphModule(self._owner, self.graph))
        with mode if mode is not None else contextlib.nullcontext():
            found: tuple[Any, ...] = interpreter.run(*self._examples())
        return found

    def _examples(self) -> list[Any]:
        mode = _fake_mode(self.graph)
        examples = []
        for source, place in zip(self.inputs, self.graph.find_nodes(op="placeholder"), strict=True):
            value = value_of(place)
            if value is None and source.op == "get_attr":
                value = operator.attrgetter(str(source.target))(self._owner)
            if isinstance(value, torch.Tensor) and not isinstance(value, torch._subclasses.FakeTensor):
                value = mode.from_tensor(value) if mode is not None else value
            examples.append(value)
        return examples


def _fake_mode(graph: fx.Graph) -> Any:
    """The mode of the fake values that were recorded: dynamo has another one ready for its backend."""
    for node in graph.nodes:
        value = value_of(node)
        if isinstance(value, torch._subclasses.FakeTensor):
            return value.fake_mode
    context = torch._guards.TracingContext.try_get()
    return context.fake_mode if context is not None else None


def _is_tensor(owner: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(operator.attrgetter(str(node.target))(owner), torch.Tensor)


def _sizes(owner: fx.GraphModule, nodes: list[fx.Node]) -> list[fx.Node]:
    """The inputs of ``owner`` that are symbolic sizes occurring in the shapes of ``nodes``.

    A shape in which a size occurs only in a product does not tell the size.
    """
    occurring: set[Any] = set()
    for node in nodes:
        for value in torch.utils._pytree.tree_leaves(value_of(node)):
            if isinstance(value, torch.Tensor) and value.layout is torch.strided:
                value = (*value.shape, *value.stride(), value.storage_offset())
            for size in value if isinstance(value, tuple) else (value,):
                if isinstance(size, torch.SymInt):
                    occurring |= size.node.expr.free_symbols
    found = []
    for node in owner.graph.find_nodes(op="placeholder") if occurring else ():
        value = value_of(node)
        if isinstance(value, torch.SymInt) and value.node.expr in occurring:
            found.append(node)
    return found


def value_of(node: fx.Node) -> Any:
    """The fake value that was recorded of ``node``, or None."""
    return node.meta.get("example_value", node.meta.get("val"))


def _target(node: fx.Node) -> Any:
    return node.target if isinstance(node.target, str) else id(node.target)


def _any(node: fx.Node) -> str:
    return "node"


def _frozen(value: Any, of_node: Callable[[fx.Node], Any]) -> Any:
    """``value`` as what can be compared and hashed; nodes in it as ``of_node`` gives them."""
    if isinstance(value, fx.Node):
        return ("node", of_node(value))
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *(_frozen(item, of_node) for item in value))
    if isinstance(value, dict):
        return tuple((name, _frozen(item, of_node)) for name, item in value.items())
    if isinstance(value, slice):
        return ("slice", *(_frozen(item, of_node) for item in (value.start, value.stop, value.step)))
    return (type(value).__name__, repr(value))


def _meta(node: fx.Node) -> Any:
    """Types, shapes and strides of what ``node`` yields."""
    return _described(value_of(node))


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        strides = f"{value.stride()}+{value.storage_offset()}" if value.layout is torch.strided else ""
        facts = (value.dtype, value.layout, value.device, tuple(value.shape), strides, value.requires_grad)
        return ("tensor", *map(str, facts))
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *(_described(item) for item in value))
    return (type(value).__name__, repr(value))
