"""A part of a captured graph as a graph of its own, and what tells whether two of them are the same."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from kpt.compiling.writes import value_of


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
        #: Those of the inputs that were seen to be written to when `results` ran.
        self.written: list[fx.Node] = []
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

    @property
    def strides_differ(self) -> bool:
        """Whether an input has other strides than those that were recorded of it."""
        places = zip(self.inputs, self.graph.find_nodes(op="placeholder"), strict=True)
        return any(_strides(value_of(source)) != _strides(value_of(place)) for source, place in places)

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
        mode, examples = _fake_mode(self.graph), self._examples()
        versions = list(map(_version, examples))
        interpreter = fx.Interpreter(fx.GraphModule(self._owner, self.graph))
        with mode if mode is not None else contextlib.nullcontext():
            found: tuple[Any, ...] = interpreter.run(*examples)
        pairs = zip(self.inputs, versions, map(_version, examples), strict=True)
        self.written = [node for node, before, after in pairs if before != after]
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


def _version(value: Any) -> int | None:
    """How often a tensor was written to, or None where torch does not count it."""
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else None


def _strides(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value.stride())) if isinstance(value, torch.Tensor) else ()


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        strides = f"{value.stride()}+{value.storage_offset()}" if value.layout is torch.strided else ""
        facts = (value.dtype, value.layout, value.device, tuple(value.shape), strides, value.requires_grad)
        return ("tensor", *map(str, facts))
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *(_described(item) for item in value))
    return (type(value).__name__, repr(value))
