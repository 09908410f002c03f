"""Where a captured graph may compute an op: candidate regions, found by the shape of the arithmetic.

Discovery only has to be generous. Names and literals select what is worth a proof; what a region
computes is decided by running it (`kpt.ops.graph`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

_CASTS = frozenset(
    {"to", "float", "half", "bfloat16", "double", "type_as", "type", "_to_copy", "contiguous", "dropout"}
)
_LIMIT = 60  # nodes in one region


@dataclass
class Region:
    """Nodes between ``inputs`` and ``outputs``. ``weights`` are inputs that stand for parameters,
    by the path that a recogniser sees; ``attributes`` are literals under the names of a module's
    options; ``kind`` says which recognisers to ask, ``ops`` what they may claim. ``parts`` are the ops that
    a larger one is made of: a kernel that serves one of them in the same forward leaves nothing of it."""

    outputs: tuple[Node, ...]
    inputs: tuple[Node, ...]
    weights: dict[str, Node] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    kind: str = "module"
    ops: frozenset[str] = frozenset()
    parts: frozenset[str] = frozenset()

    def __deepcopy__(self, memo: dict[int, Any]) -> Region:
        return self  # a copied node would take its whole graph along

    def nodes(self) -> list[Node] | None:
        """The nodes to run, in order; None when something else would be needed to run them."""
        cut = {*self.inputs, *self.weights.values()}
        wanted: set[Node] = set()
        stack = list(self.outputs)
        while stack:
            node = stack.pop()
            if node in wanted or node in cut:
                continue
            if node.op in ("placeholder", "get_attr", "call_module", "output") or len(wanted) > _LIMIT:
                return None
            wanted.add(node)
            stack.extend(node.all_input_nodes)
        return [node for node in self.outputs[0].graph.nodes if node in wanted]

    def literals(self) -> tuple[float, ...]:
        """Numbers that the region's nodes were called with."""
        found: list[float] = []
        for node in self.nodes() or ():
            for value in (*node.args, *node.kwargs.values()):
                if type(value) is float:
                    found.append(value)
        return tuple(dict.fromkeys(found))


def base_name(node: Node) -> str:
    """What a node calls, without namespace, overload and in-place underscore."""
    if node.op == "call_method":
        return str(node.target)
    target: Any = node.target
    packet = getattr(target, "overloadpacket", None)
    name = getattr(packet or target, "__name__", str(target))
    return name.strip("_") if name in ("__add__", "__mul__") else name


def example(node: Any) -> Any:
    """The fake value of a node, if the capture left one."""
    return node.meta.get("example_value", node.meta.get("val")) if isinstance(node, Node) else None


def shape(node: Any) -> tuple[int, ...] | None:
    """The sizes of a tensor node; the hint stands for a symbolic one."""
    value = example(node)
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(size if isinstance(size, int) else int(size.node.hint) for size in value.shape)


def through(node: Any, names: frozenset[str] = _CASTS) -> Any:
    """The tensor behind casts (or behind calls of other ``names``)."""
    while isinstance(node, Node) and base_name(node) in names and node.op != "placeholder" and node.args:
        node = node.args[0]
    return node


def operands(node: Node) -> list[Node]:
    """What a node was given as positional arguments, literals aside."""
    return [a for a in node.args if isinstance(a, Node)]


def argument(node: Node, index: int, *names: str) -> Any:
    """The argument at ``index`` or of one of ``names``; None where it was left out."""
    if len(node.args) > index:
        return node.args[index]
    return next((node.kwargs[name] for name in names if name in node.kwargs), None)


def regions(graph: torch.fx.Graph) -> Iterator[Region]:
    """Candidates in the order of the graph, larger ones before those inside them."""
    paired: set[Node] = set()
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method") or shape(node) is None:
            continue
        name = base_name(node)
        if name == "linear":
            yield from _gated_mlp(node)
            yield from _linear(node)
        elif name in ("layer_norm", "rms_norm"):
            yield from _named_norm(node, name)
        elif name in ("rsqrt", "sqrt", "pow", "reciprocal") and _is_root(node, name):
            yield from _inline_norm(node)
        elif name == "softmax":
            yield from _inline_attention(node)
            yield _named(node, ("dim", "dtype"), {"softmax"})
        elif name in ("div", "truediv"):
            yield from _inline_softmax(node)
        elif name == "scaled_dot_product_attention":
            inputs = tuple(a for a in (*node.args, *node.kwargs.values()) if isinstance(a, Node))
            yield Region((node,), inputs, attributes={}, kind="function", ops=frozenset({"attention"}))
        elif name == "cross_entropy":
            yield _named(
                node, ("weight", "_", "ignore_index", "_", "reduction", "label_smoothing"), {"cross_entropy"}
            )
        elif name == "cat":
            yield from _ropes(node, paired)


def _named(node: Node, options: tuple[str, ...], ops: set[str]) -> Region:
    inputs = tuple(a for a in (*node.args, *node.kwargs.values()) if isinstance(a, Node))
    tensors = len([a for a in node.args if isinstance(a, Node)])
    attributes = {
        k: v for k, v in zip(options, node.args[tensors:]) if not isinstance(v, Node) and v is not None
    }
    attributes.update((k, v) for k, v in node.kwargs.items() if not isinstance(v, Node) and v is not None)
    return Region((node,), inputs, attributes=attributes, ops=frozenset(ops))


def _linear(node: Node) -> Iterator[Region]:
    x, weight, bias = node.args[0], argument(node, 1, "weight"), argument(node, 2, "bias")
    if isinstance(x, Node) and isinstance(weight, Node):
        weights = {"weight": weight, **({"bias": bias} if isinstance(bias, Node) else {})}
        yield Region((node,), (x,), weights, ops=frozenset({"linear"}))


def _gated_mlp(down: Node) -> Iterator[Region]:
    product = through(down.args[0])
    if not isinstance(product, Node) or base_name(product) not in ("mul", "__mul__"):
        return
    projections: list[Node] = []
    for side in operands(product):
        node: Any = side
        for _ in range(6):
            if not isinstance(node, Node) or base_name(node) == "linear":
                break
            node = node.args[0] if node.args else None
        if isinstance(node, Node) and base_name(node) == "linear" and node not in projections:
            projections.append(node)
    if not projections or len({p.args[0] for p in projections}) != 1:
        return
    weights: dict[str, Node] = {}
    for label, node in (*((f"in{i}", p) for i, p in enumerate(projections)), ("down", down)):
        weight, bias = argument(node, 1, "weight"), argument(node, 2, "bias")
        if not isinstance(weight, Node):
            return
        weights[f"{label}.weight"] = weight
        if isinstance(bias, Node):
            weights[f"{label}.bias"] = bias
    x = projections[0].args[0]
    if isinstance(x, Node):
        yield Region((down,), (x,), weights, ops=frozenset({"gated_mlp"}))


def _is_root(node: Node, name: str) -> bool:
    if name == "pow":
        return len(node.args) > 1 and node.args[1] in (0.5, -0.5)
    return name != "reciprocal"


def _inline_norm(root: Node) -> Iterator[Region]:
    """From the square root back to what was averaged, then forward as far as the shape stays."""
    mean: Any = root.args[0]
    for _ in range(4):
        if isinstance(mean, Node) and base_name(mean) in ("mean", "var", "sum"):
            break
        mean = mean.args[0] if isinstance(mean, Node) and mean.args else None
    if not isinstance(mean, Node) or base_name(mean) not in ("mean", "var", "sum"):
        return
    source: Any = mean.args[0]
    if base_name(mean) != "var":
        if not isinstance(source, Node) or base_name(source) not in ("pow", "square", "mul", "__mul__"):
            return
        source = source.args[0]
    source = through(source)
    if isinstance(source, Node) and base_name(source) == "sub":  # what layer_norm centres
        source = through(source.args[0])
    if not isinstance(source, Node) or shape(source) is None:
        return
    ends: list[Node] = []
    frontier = [root]
    while frontier and len(ends) < 12:
        fresh = []
        for node in frontier:
            for user in node.users:
                if user.op != "output" and shape(user) in (shape(source), shape(root)) and user not in ends:
                    if base_name(user) in (
                        "mul",
                        "__mul__",
                        "div",
                        "truediv",
                        "add",
                        *_CASTS,
                        "add_1",
                        "reciprocal",
                    ):
                        fresh.append(user)
                        if shape(user) == shape(source):
                            ends.append(user)
        frontier = fresh
    yield from _norm_regions(ends[::-1], source)


def _norm_regions(ends: list[Node], source: Node) -> Iterator[Region]:
    ops = frozenset({"rms_norm", "layer_norm"})
    last = (shape(source) or (0,))[-1:]
    for end in ends:
        weights: dict[str, Node] = {}
        stack, seen = [end], {source}
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if shape(node) == last and node.op in ("placeholder", "get_attr"):
                weights[f"vector{len(weights)}"] = node
            else:
                stack.extend(node.all_input_nodes)
        if len(weights) > 2:
            continue
        region = Region((end,), (source,), weights, ops=ops)
        if region.nodes() is None:
            continue
        yield from _with_residual(region)
        yield region


def _with_residual(region: Region) -> Iterator[Region]:
    """The same norm together with the addition in front of it."""
    total = region.inputs[0]
    addends = operands(total) if total.op in ("call_function", "call_method") else []
    if base_name(total) in ("add", "__add__", "iadd") and len(addends) == 2:
        if shape(addends[0]) == shape(addends[1]) == shape(total):
            ops = frozenset({"add_rms_norm"})
            yield Region((region.outputs[0], total), (addends[0], addends[1]), region.weights, ops=ops)


def _named_norm(node: Node, name: str) -> Iterator[Region]:
    x = node.args[0]
    size = argument(node, 1, "normalized_shape")
    if not isinstance(x, Node) or not isinstance(size, (tuple, list)) or len(size) != 1:
        return
    order = ("weight", "bias", "eps") if name == "layer_norm" else ("weight", "eps")
    given = {label: argument(node, index + 2, label) for index, label in enumerate(order)}
    weights = {label: value for label, value in given.items() if isinstance(value, Node)}
    eps = given["eps"] if given["eps"] is not None or name == "rms_norm" else 1e-5
    region = Region((node,), (x,), weights, {"eps": eps}, ops=frozenset({name}))
    yield from _with_residual(region)
    yield region


def _inline_softmax(node: Node) -> Iterator[Region]:
    top, below = node.args[0], argument(node, 1, "other")
    if not isinstance(top, Node) or not isinstance(below, Node):
        return
    if base_name(top) != "exp" or base_name(below) != "sum" or below.args[0] is not top:
        return
    inner: Any = top.args[0]
    if isinstance(inner, Node) and base_name(inner) == "sub":
        inner = inner.args[0]
    if isinstance(inner, Node):
        yield Region((node,), (inner,), ops=frozenset({"softmax"}))


def _inline_attention(node: Node) -> Iterator[Region]:
    """Scores from a product on one side of a softmax, values on the other."""
    scores: Any = node.args[0]
    masks: list[Node] = []
    for _ in range(8):
        if not isinstance(scores, Node) or base_name(scores) in ("matmul", "bmm", "__matmul__"):
            break
        if base_name(scores) in ("add", "__add__", "iadd"):
            masks += [a for a in scores.args[1:] if isinstance(a, Node)]
        scores = scores.args[0] if scores.args else None
    if (
        not isinstance(scores, Node)
        or base_name(scores) not in ("matmul", "bmm", "__matmul__")
        or len(masks) > 1
    ):
        return
    end: Node | None = node
    for _ in range(4):
        users = list(end.users) if end is not None else []
        end = users[0] if len(users) == 1 else None
        if end is None or base_name(end) in ("matmul", "bmm", "__matmul__"):
            break
    q, k = scores.args[0], argument(scores, 1, "other")
    if end is None or base_name(end) not in ("matmul", "bmm", "__matmul__") or not isinstance(q, Node):
        return
    v = argument(end, 1, "other")
    if isinstance(k, Node) and base_name(k) in ("transpose", "permute", "t", "mT"):
        k = k.args[0]
    while base_name(q) in ("mul", "__mul__", "div", "truediv") and isinstance(q.args[0], Node):
        q = q.args[0]  # scaled before the product
    if isinstance(k, Node) and isinstance(v, Node) and all(len(shape(n) or ()) == 4 for n in (q, k, v)):
        yield Region((end,), (q, k, v, *masks), kind="function", ops=frozenset({"attention"}))


def _turned(cat: Node) -> tuple[Node, Node, Node, Node] | None:
    """From ``cat(-x2, x1)`` to (x, cos, sin, out) of one rotated tensor."""
    parts = cat.args[0] if cat.args else ()
    if not isinstance(parts, (tuple, list)) or len(parts) != 2 or not isinstance(parts[0], Node):
        return None
    if base_name(parts[0]) not in ("neg", "__neg__"):
        return None
    half = parts[0].args[0]
    for _ in range(2):
        if isinstance(half, Node) and base_name(half) in ("getitem", "chunk", "split", "slice"):
            half = half.args[0]
    for product in cat.users:
        if base_name(product) not in ("mul", "__mul__"):
            continue
        sin = next((a for a in operands(product) if a is not cat), None)
        for out in product.users:
            if base_name(out) not in ("add", "__add__", "iadd"):
                continue
            other = next((a for a in operands(out) if a is not product), None)
            if other is not None and base_name(other) in ("mul", "__mul__") and half in other.args:
                cos = next((a for a in operands(other) if a is not half), None)
                if isinstance(half, Node) and sin is not None and cos is not None:
                    return half, cos, sin, out
    return None


def _ropes(cat: Node, paired: set[Node]) -> Iterator[Region]:
    """Queries and keys turned by the same tables; layers share tables, so each is paired once."""
    first = _turned(cat)
    if first is None or cat in paired:
        return
    for node in list(cat.graph.nodes):
        if node is not cat and node.op == "call_function" and base_name(node) == "cat":
            second = _turned(node)
            if second is None or not cat < node:
                continue
            tables = first[1:3]
            if second[1:3] != tables:  # each brought into shape for itself
                tables = _origin(first[1]), _origin(first[2])
                if (_origin(second[1]), _origin(second[2])) != tables:
                    continue
            inputs = (first[0], second[0], *tables)
            paired.add(node)
            yield Region((first[3], second[3]), inputs, kind="function", ops=frozenset({"rope"}))
            return


def _origin(node: Node) -> Node:
    """The table behind an ``unsqueeze``."""
    while base_name(node) == "unsqueeze" and isinstance(node.args[0], Node):
        node = node.args[0]
    return node
