"""Recognition in a graph that dynamo (or export) captured: inline arithmetic included.

A candidate region becomes a small module: the tensors that flow in are its inputs, those that look
like weights its parameters. Then the same recognisers and the same proof apply as to any module.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from kpt.ops import index
from kpt.ops.capture import Captured, Seen, untouched_randomness
from kpt.ops.hypotheses import Literals
from kpt.ops.proof import Outcome, OutOfTime, prove
from kpt.ops.recognition import Recognition
from kpt.ops.regions import Region, example, regions, shape
from kpt.ops.sites import Binding, Example, Hypothesis, Site

_PROOFS: dict[Hashable, Outcome] = {}


class _Holder(torch.nn.Module):
    """A part of a path, such as the ``down`` of ``down.weight``."""


class RegionModule(torch.nn.Module):
    """One region of a graph as a module, with literals and weights where recognisers look for them."""

    def __init__(self, region: Region, owner: torch.nn.Module) -> None:
        super().__init__()
        self._region = region
        self._literals = Literals(region.literals(), region.attributes)
        for name, value in region.attributes.items():
            if name.isidentifier() and name not in region.weights and not hasattr(self, name):
                setattr(self, name, value)
        for path, node in region.weights.items():
            holder: torch.nn.Module = self
            *above, last = path.split(".")
            for part in above:
                if part not in holder._modules:
                    holder.add_module(part, _Holder())
                holder = holder._modules[part]  # type: ignore[assignment]
            fake = example(node)
            empty = torch.empty(shape(node) or (), dtype=fake.dtype, device=_real_device(fake))
            holder.register_parameter(last, torch.nn.Parameter(empty, fake.is_floating_point()))
        self._code = _runnable(region, owner)

    def forward(self, *inputs: torch.Tensor) -> Any:
        weights = [self.get_parameter(path) for path in self._region.weights]
        return self._code(*inputs, *weights)

    def __deepcopy__(self, memo: dict[int, Any]) -> RegionModule:
        return self


def _real_device(fake: torch.Tensor) -> torch.device:
    return fake.device if fake.device.type != "meta" else torch.device("cpu")


def _runnable(region: Region, owner: torch.nn.Module) -> Callable[..., Any]:
    graph = Graph()
    copies: dict[Node, Node] = {}
    for position, node in enumerate((*region.inputs, *region.weights.values())):
        placeholder = graph.placeholder(f"value_{position}")
        copies.setdefault(node, placeholder)
    for position, node in enumerate(region.nodes() or ()):
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        copies[node].name = f"step_{position}"
    results = tuple(copies[node] for node in region.outputs)
    graph.output(results if len(results) > 1 else results[0])
    module = GraphModule(owner, graph)
    function: Callable[..., Any] = type(module).forward.__get__(module)
    return function


def _captured(region: Region, owner: torch.nn.Module) -> Captured | None:
    module = RegionModule(region, owner)
    names = ("x", "y", "z", "u", "v")[: len(region.inputs)]
    if len(names) != len(region.inputs):
        return None
    if region.kind == "function":
        names = tuple(f"{n}_mask" if i == 3 and "attention" in region.ops else n for i, n in enumerate(names))
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    call = {name: _seen(node) for name, node in zip(names, region.inputs)}
    outputs = tuple(_seen(node) for node in region.outputs)
    if any(value is None for value in (*call.values(), *outputs)):
        return None
    output = outputs if len(outputs) > 1 else outputs[0]
    captured = Captured("", module, signature, [call], [output])
    if region.kind == "function":
        captured.function = module._code
    return captured


def _seen(node: Node) -> Seen | None:
    fake, sizes = example(node), shape(node)
    if sizes is None:
        return None
    value = None
    if not fake.is_floating_point():  # never drawn at random: class indices, or a mask that keeps all
        value = torch.ones(sizes, dtype=fake.dtype)
    return Seen(sizes, fake.dtype, (), _real_device(fake), value)


def recognise_graph(
    gm: GraphModule, *, registry: Any = None, deadline: float | None = None, training: bool = False
) -> Recognition:
    """The ops that a captured graph computes: named calls and inline arithmetic alike.

    ``gm`` is a graph of torch functions with fake values in its nodes' metadata, as a dynamo backend
    receives it. Sites have kind ``"graph"`` and the names of their nodes; a larger one (a gated MLP)
    comes before those inside it (its projections). The graph is not changed.
    """
    started = time.monotonic()
    sites: list[Site] = []
    left_alone: list[tuple[str, str]] = []
    proofs = 0
    claimed: dict[tuple[str, Node], bool] = {}
    mode = "training" if training else "inference"
    with untouched_randomness(), torch.inference_mode(False):
        for region in regions(gm.graph):
            name = region.outputs[0].name
            hypotheses, captured = _hypotheses(region, gm, registry)
            if captured is None or not hypotheses:
                continue
            if not _replaceable(region):
                continue
            if any(claimed.get((op, root)) for op in region.ops for root in _roots(region)):
                continue  # the longer region that ends further on was proved
            key = _key(region, captured)
            outcome = _PROOFS.get(key)
            if outcome is None:
                try:
                    outcome = prove(
                        captured,
                        hypotheses,
                        lambda op: index.reference(op, registry),
                        deadline,
                        straight=True,
                    )
                except OutOfTime as late:
                    left_alone.append((name, str(late)))
                    break
                proofs += 1
                _PROOFS[key] = outcome
            dtype = str(next(iter(captured.tensors().values())).dtype).removeprefix("torch.")
            if outcome.hypothesis is None:
                left_alone.append((name, outcome.reason))
            elif mode not in outcome.modes:
                left_alone.append((name, f"it is {outcome.hypothesis.op} in evaluation mode only"))
            elif dtype not in outcome.dtypes:
                left_alone.append((name, f"it returns another dtype than {outcome.hypothesis.op} does"))
            else:
                for root in _roots(region):
                    claimed[outcome.hypothesis.op, root] = True
                sites.append(_site(region, captured, outcome))
    proved = {name for site in sites for name in site.nodes}
    reasons = dict(item for item in left_alone if item[0] not in proved)
    return Recognition(tuple(sites), tuple(reasons.items()), time.monotonic() - started, proofs)


def _roots(region: Region) -> list[Node]:
    """What tells one norm from the next although their candidate ends differ: where the input enters."""
    return [region.inputs[0]] if region.ops & {"rms_norm", "layer_norm", "add_rms_norm"} else []


def _replaceable(region: Region) -> bool:
    """Whether one node could compute all outputs: nothing may need one before all inputs are there."""
    if len(region.outputs) == 1:
        return True
    inner = {*(region.nodes() or ())}
    last = max(region.inputs)
    return all(last < user for out in region.outputs for user in out.users if user not in inner)


def _hypotheses(region: Region, gm: GraphModule, registry: Any) -> tuple[list[Hypothesis], Captured | None]:
    if region.nodes() is None:
        return [], None
    captured = _captured(region, gm)
    if captured is None:
        return [], None
    method = "hypotheses" if region.kind == "module" else "function_hypotheses"
    found: list[Hypothesis] = []
    for recogniser in index.recognisers(registry):
        propose = getattr(recogniser, method, None)
        if propose is not None:
            found.extend(h for h in propose(captured.module, captured) if h.op in region.ops)
    return found, captured


def _key(region: Region, captured: Captured) -> Hashable:
    """The region's own code, with what flows in; equal layers share a proof."""
    inner: Any = captured.module._code
    values = tuple((shape(n), example(n).dtype) for n in (*region.inputs, *region.weights.values()))
    targets = tuple(str(node.target) for node in region.nodes() or ())
    return (inner.__self__.code, targets, values, tuple(region.weights), region.kind, region.ops)


def _site(region: Region, captured: Captured, outcome: Outcome) -> Site:
    assert outcome.hypothesis is not None
    seen = captured.tensors()
    shown = Example(
        {name: str(value.dtype).removeprefix("torch.") for name, value in seen.items()},
        {name: value.shape for name, value in seen.items()},
        {},
        str(next(iter(seen.values())).device),
    )
    return Site(
        op=outcome.hypothesis.op,
        path="",
        kind="graph",
        module=captured.module,
        binding=Binding(outcome.hypothesis, captured.signature, outcome.constants),
        examples=(shown,),
        devices=(shown.device,),
        modes=outcome.modes,
        dtypes=outcome.dtypes,
        callee=region.outputs[0].name,
        nodes=tuple(node.name for node in region.nodes() or ()),
        inputs=tuple(node.name for node in region.inputs),
        outputs=tuple(node.name for node in region.outputs),
    )


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

    Nodes that nothing needs any more are removed. Raises `ValueError` when the graph has no such
    nodes, for instance because another site took them.
    """
    nodes = {node.name: node for node in gm.graph.nodes}
    replaced: dict[str, str] = gm.meta.setdefault("kpt_replaced", {})  # outputs of sites before this one
    nodes.update((old, nodes[new]) for old, new in replaced.items() if new in nodes)
    region = site.module._region
    wanted = [*site.inputs, *site.outputs, *(node.name for node in region.weights.values())]
    missing = [name for name in wanted if name not in nodes]
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

    with graph.inserting_before(
        _insertion(graph, [nodes[name] for name in wanted[: len(site.inputs)]], weights)
    ):
        result = site.binding.run(_Weights(weights, region.attributes), call, *map(proxy, site.inputs))
        results = list(result) if isinstance(result, tuple) else [result]
    fresh = {item.node for item in results}
    for name, item in zip(site.outputs, results, strict=True):
        old = nodes[name]
        if "example_value" in old.meta:
            item.node.meta.setdefault("example_value", old.meta["example_value"])
        old.replace_all_uses_with(item.node, delete_user_cb=lambda user: user not in fresh)
        replaced[name] = item.node.name
    graph.eliminate_dead_code()
    graph.lint()
    gm.recompile()
    return gm


def _insertion(graph: Graph, inputs: list[Node], weights: dict[str, Proxy]) -> Node:
    """The first node that comes after everything the kernel needs, and after all placeholders."""
    needed = {*inputs, *(proxy.node for proxy in weights.values())}
    last: Node | None = None
    for node in graph.nodes:
        if node in needed or node.op == "placeholder":
            last = node
    if last is None:
        return next(iter(graph.nodes))
    return last.next


def graph_sites(recognition: Recognition) -> Iterator[Site]:
    """Sites that do not overlap, the larger before the smaller, ready to be substituted one by one."""
    taken: set[str] = set()
    for site in sorted(recognition.sites, key=lambda s: -len(s.nodes)):
        if not taken.intersection(site.nodes):
            taken.update(site.nodes)
            yield site
