"""Putting a kernel where a captured graph computes an op."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

if TYPE_CHECKING:
    from kpt.ops.regions import Region
    from kpt.ops.sites import Site

_ASSIGNMENTS = frozenset(
    {
        "setitem",
        "iadd",
        "isub",
        "imul",
        "itruediv",
        "ifloordiv",
        "imod",
        "ipow",
        "imatmul",
        "iand",
        "ior",
        "ixor",
    }
)


def replaceable(region: Region) -> bool:
    """Whether one node could compute all outputs of ``region``.

    Nothing may need one of them before all inputs are there, and nothing beside the region may write to
    a tensor between its first node and its last, which the one node would see too early or too late.
    """
    inner = {*(region.nodes() or ())}
    last = max(region.inputs)
    if len(region.outputs) > 1:
        if not all(last < user for out in region.outputs for user in out.users if user not in inner):
            return False
    node, end = min(inner), max(*region.outputs, last)
    while node is not end:
        if node not in inner and _writes(node):
            return False
        node = node.next
    return True


def _writes(node: Node) -> bool:
    """Whether a node changes a tensor that it was given."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    name = name.partition(".")[0]  # without the overload
    if name.startswith("__"):
        return name.strip("_") in _ASSIGNMENTS
    by_option = bool(node.kwargs.get("inplace")) or node.kwargs.get("out") is not None
    return by_option or name.endswith("_") or name in _ASSIGNMENTS


class _Weights:
    """Stands in for a region's module while its binding is written into a graph."""

    def __init__(self, found: dict[str, Any], attributes: dict[str, Any]) -> None:
        for path, value in found.items():
            holder = self
            *above, last = path.split(".")
            for part in above:
                holder = holder.__dict__.setdefault(part, _Weights({}, {}))
            holder.__dict__[last] = value
        for name, value in attributes.items():
            self.__dict__.setdefault(name, value)


def substitute(gm: GraphModule, site: Site, kernel: Callable[..., Any]) -> GraphModule:
    """Let ``kernel`` compute ``site`` in ``gm``, which is changed in place and returned.

    The kernel is called with keywords only. Nodes of the site that nothing needs any more are removed. Raises
    `ValueError` when the graph has no such nodes, for instance because another site took them.
    """
    nodes = {node.name: node for node in gm.graph.nodes}
    replaced: dict[str, str] = gm.meta.setdefault("kpt_replaced", {})  # outputs of sites before this one
    nodes.update((old, nodes[new]) for old, new in replaced.items() if new in nodes)
    region: Region = site.module._region  # type: ignore[assignment]
    weight_names = [node.name for node in region.weights.values()]
    missing = [name for name in (*site.inputs, *site.outputs, *weight_names) if name not in nodes]
    if site.kind != "graph" or missing:
        raise ValueError(
            f"the graph has no nodes {', '.join(missing) or site.kind}; {site.name} is not in it"
        )
    graph = gm.graph
    tracer = GraphAppendingTracer(graph)

    def proxy(name: str) -> Proxy:
        return Proxy(nodes[name], tracer)

    weights = {path: proxy(node.name) for path, node in region.weights.items()}

    def call(**arguments: Any) -> Proxy:
        plain = {n: v.node if isinstance(v, Proxy) else v for n, v in arguments.items()}
        return Proxy(graph.call_function(kernel, (), plain), tracer)

    needed = [nodes[name] for name in (*site.inputs, *weight_names)]
    with graph.inserting_before(_insertion(graph, needed, [nodes[name] for name in site.outputs])):
        result = site.binding.run(_Weights(weights, region.attributes), call, *map(proxy, site.inputs))
        results = list(result) if isinstance(result, tuple) else [result]
    fresh = {item.node for item in results}
    for name, item in zip(site.outputs, results, strict=True):
        old = nodes[name]
        if "example_value" in old.meta:
            item.node.meta.setdefault("example_value", old.meta["example_value"])
        old.replace_all_uses_with(item.node, delete_user_cb=lambda user: user not in fresh)
        replaced[name] = item.node.name
    _erase(graph, {nodes[name] for name in site.nodes if name in nodes})
    graph.lint()
    gm.recompile()
    return gm


def _erase(graph: Graph, region: set[Node]) -> None:
    """Remove the nodes of a region that nothing uses; all others stay, for what they may write to.

    (Of a call such as ``x.add_(1)`` torch's own removal of dead code thinks that it has no effect.)
    """
    for node in sorted(region, reverse=True):
        if node.users or (_writes(node) and not _on_its_own(node, region)):
            continue
        graph.erase_node(node)


def _on_its_own(node: Node, region: set[Node]) -> bool:
    """Whether what ``node`` writes to was made in the region and is used by nobody else."""
    target = node.args[0] if node.args else None
    return isinstance(target, Node) and target in region and set(target.users) == {node}


def _insertion(graph: Graph, needed: Iterable[Node], outputs: Iterable[Node]) -> Node:
    """The first of ``outputs``, or what comes after the last needed node if that is later.

    As late as can be: what writes to an input before the region reads it has then done so.
    """
    first, last = min(outputs), max(needed, default=None)
    return first if last is None or last < first else last.next


def graph_sites(sites: Iterable[Site]) -> Iterator[Site]:
    """Those of ``sites`` that do not overlap, the larger before the smaller, to be substituted in turn."""
    taken: set[str] = set()
    for site in sorted(sites, key=lambda s: -len(s.nodes)):
        if not taken.intersection(site.nodes):
            taken.update(site.nodes)
            yield site
