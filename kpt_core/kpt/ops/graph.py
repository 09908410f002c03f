"""Recognition in a graph that dynamo (or export) captured: inline arithmetic included.

A candidate region becomes a small module: the tensors that flow in are its inputs, those that look
like weights its parameters. Then the same recognisers and the same proof apply as to any module.
"""

from __future__ import annotations

import inspect
import math
import re
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from kpt.error_text import summary
from kpt.ops import index
from kpt.ops.binding import Binding, Hypothesis
from kpt.ops.capture import untouched_randomness
from kpt.ops.captured import Captured, Seen
from kpt.ops.claims import OutOfTime
from kpt.ops.hypotheses import Literals
from kpt.ops.proof import Outcome, prove
from kpt.ops.recognition import GRAPH_PROOFS, Recognition
from kpt.ops.regions import Region, example, regions, shape
from kpt.ops.sites import Example, Site
from kpt.ops.sizes import BIG, shrunk
from kpt.ops.substitution import replaceable

_PROOFS_LIMIT = 4096
#: Elements of weights up to which a region is proved at its own size, if its smaller copy was not.
_AFFORDABLE = 1 << 24
#: Stand-ins for weights, by shape, dtype, device and the how-manieth it is in its region.
Blanks = dict[Hashable, torch.nn.Parameter]
#: Smaller sizes by the real ones.
Sizes = dict[int, int]


class _Holder(torch.nn.Module):
    """A part of a path, such as the ``down`` of ``down.weight``."""


class RegionModule(torch.nn.Module):
    """One region of a graph as a module, with literals and weights where recognisers look for them."""

    def __init__(
        self, region: Region, owner: torch.nn.Module, blanks: Blanks, sizes: Sizes, device: str = ""
    ) -> None:
        super().__init__()
        self._region = region
        self._literals = Literals(region.literals(), region.attributes)
        for name, value in region.attributes.items():
            if name.isidentifier() and name not in region.weights and not hasattr(self, name):
                setattr(self, name, value)
        for position, (path, node) in enumerate(region.weights.items()):
            holder: torch.nn.Module = self
            *above, last = path.split(".")
            for part in above:
                if part not in holder._modules:
                    holder.add_module(part, _Holder())
                holder = holder._modules[part]  # type: ignore[assignment]
            # Layers share their stand-ins, or all of them together would take a model's memory again.
            fake, own = example(node), _sized(shape(node) or (), sizes)
            key = (position, own, fake.dtype, device or fake.device)
            if key not in blanks:
                blank = torch.ones(own, dtype=fake.dtype, device=device or _real_device(fake))
                blanks[key] = torch.nn.Parameter(blank, fake.is_floating_point())
            holder.register_parameter(last, blanks[key])
        self._code = _runnable(region, owner, sizes)

    def forward(self, *inputs: torch.Tensor) -> Any:
        weights = [self.get_parameter(path) for path in self._region.weights]
        return self._code(*inputs, *weights)

    def __deepcopy__(self, memo: dict[int, Any]) -> RegionModule:
        return self


def _real_device(fake: torch.Tensor) -> torch.device:
    return fake.device if fake.device.type != "meta" else torch.device("cpu")


def _sized(shape: tuple[int, ...], sizes: Sizes) -> tuple[int, ...]:
    return tuple(sizes.get(size, size) for size in shape)


def _smaller(region: Region) -> Sizes:
    """For a region with large weights: smaller sizes to prove it with, in proportion to those of its weights.

    A proof of a language model's head would else take gigabytes.
    """
    shapes = [shape(node) or () for node in region.weights.values()]
    if sum(map(math.prod, shapes)) <= BIG:
        return {}
    return shrunk({size for own in shapes for size in own if size > 64})


def _runnable(region: Region, owner: torch.nn.Module, sizes: Sizes) -> Callable[..., Any]:
    graph = Graph()
    copies: dict[Node, Node] = {}
    for position, node in enumerate((*region.inputs, *region.weights.values())):
        placeholder = graph.placeholder(f"value_{position}")
        copies.setdefault(node, placeholder)
    for position, node in enumerate(region.nodes() or ()):
        copies[node] = copy = graph.node_copy(node, lambda n: copies[n])
        if sizes:
            copy.args, copy.kwargs = map_aggregate(
                (copy.args, copy.kwargs), lambda a: sizes.get(a, a) if type(a) is int else a
            )
        copies[node].name = f"step_{position}"
    results = tuple(copies[node] for node in region.outputs)
    graph.output(results if len(results) > 1 else results[0])
    module = GraphModule(owner, graph)
    function: Callable[..., Any] = type(module).forward.__get__(module)
    return function


def _captured(region: Region, owner: torch.nn.Module, blanks: Blanks, sizes: Sizes) -> Captured | None:
    module = RegionModule(region, owner, blanks, sizes)
    names = ("x", "y", "z", "u", "v")[: len(region.inputs)]
    if len(names) != len(region.inputs):
        return None
    if region.kind == "function":
        names = tuple(f"{n}_mask" if i == 3 and "attention" in region.ops else n for i, n in enumerate(names))
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    call = {name: _seen(node, sizes) for name, node in zip(names, region.inputs)}
    outputs = tuple(_seen(node, sizes) for node in region.outputs)
    if any(value is None for value in (*call.values(), *outputs)):
        return None
    output = outputs if len(outputs) > 1 else outputs[0]
    captured = Captured("", module, signature, [call], [output])
    if region.kind == "function":
        captured.function = module._code
    return captured


def _seen(node: Node, smaller: Sizes) -> Seen | None:
    fake, sizes = example(node), shape(node)
    if sizes is None:
        return None
    sizes, value = _sized(sizes, smaller), None
    if not fake.is_floating_point():  # never drawn at random: class indices, or a mask that keeps all
        value = torch.ones(sizes, dtype=fake.dtype)
    return Seen(sizes, fake.dtype, (), _real_device(fake), value)


def recognise_graph(
    gm: GraphModule,
    *,
    registry: Any = None,
    deadline: float | None = None,
    training: bool = False,
    only: Collection[str] | None = None,
) -> Recognition:
    """The ops that a captured graph computes: named calls and inline arithmetic alike.

    ``gm`` is a graph of torch functions with fake values in its nodes' metadata, as a dynamo backend
    receives it. Sites have kind ``"graph"``, the names of their nodes, and the path of the module whose
    forward holds them; a larger one (a gated MLP) comes before those inside it (its projections).
    ``only`` names the ops to look for, by default all. The graph is not changed.
    """
    started = time.monotonic()
    if _autocasts(gm):
        return Recognition(left_alone=(("", "it runs under autocast, which changes what its nodes compute"),))
    sites: list[Site] = []
    left_alone: list[tuple[str, str]] = []
    proofs = 0
    claimed: dict[tuple[str, Node], bool] = {}
    mode = "training" if training else "inference"
    blanks: Blanks = {}

    def _outcome(captured: Captured, hypotheses: list[Hypothesis]) -> Outcome:
        return prove(captured, hypotheses, lambda op: index.reference(op, registry), deadline, straight=True)

    with untouched_randomness(), torch.inference_mode(False), torch.enable_grad():
        recognisers = index.recognisers(registry)
        for region in _candidates(gm, recognisers, left_alone):
            if only is not None and region.ops.isdisjoint(only):
                continue
            name = region.outputs[0].name
            sizes = _smaller(region)
            hypotheses, captured = _hypotheses(region, gm, recognisers, blanks, left_alone, sizes)
            if captured is None or not hypotheses:
                continue
            if not replaceable(region):
                continue
            if any(claimed.get((op, root)) for op in region.ops for root in _roots(region)):
                continue  # the longer region that ends further on was proved
            key = _key(region, captured, hypotheses)
            outcome = GRAPH_PROOFS.get(key)
            if outcome is None:
                try:
                    outcome = _outcome(captured, hypotheses)
                    if outcome.hypothesis is None and sizes and _affordable(region):
                        full = _hypotheses(region, gm, recognisers, blanks, left_alone, {})
                        outcome = _outcome(full[1], full[0]) if full[1] is not None else outcome
                except OutOfTime as late:
                    left_alone.append((name, str(late)))
                    break
                proofs += 1
                if len(GRAPH_PROOFS) >= _PROOFS_LIMIT:
                    GRAPH_PROOFS.clear()
                GRAPH_PROOFS[key] = outcome
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
                sites.append(_site(region, gm, captured, outcome, sizes))
    if only is not None:
        sites = [site for site in sites if site.op in only]
    proved = {name for site in sites for name in site.nodes}
    reasons = dict(item for item in left_alone if item[0] not in proved)
    return Recognition(tuple(sites), tuple(reasons.items()), time.monotonic() - started, proofs)


def _roots(region: Region) -> list[Node]:
    """What tells one norm from the next although their candidate ends differ: where the input enters."""
    return [region.inputs[0]] if region.ops & {"rms_norm", "layer_norm", "add_rms_norm"} else []


def _candidates(
    gm: GraphModule, recognisers: Iterable[Any], left_alone: list[tuple[str, str]]
) -> Iterator[Region]:
    """The regions that the core looks for, then those that recognisers find themselves."""
    yield from regions(gm.graph)
    for recogniser in recognisers:
        find = getattr(recogniser, "regions", None)
        if find is None:
            continue
        try:
            found = list(find(gm.graph))
        except Exception as error:  # noqa: BLE001 - a stranger's recogniser loses only its own
            left_alone.append(("", _raised(recogniser, error)))
            continue
        yield from found


def _raised(recogniser: Any, error: Exception) -> str:
    return f"the recogniser {type(recogniser).__name__} raised {summary(error)}"


def _hypotheses(
    region: Region,
    gm: GraphModule,
    recognisers: Iterable[Any],
    blanks: Blanks,
    left_alone: list[tuple[str, str]],
    sizes: Sizes,
) -> tuple[list[Hypothesis], Captured | None]:
    if region.nodes() is None:
        return [], None
    captured = _captured(region, gm, blanks, sizes)
    if captured is None:
        return [], None
    method = "hypotheses" if region.kind == "module" else "function_hypotheses"
    found: list[Hypothesis] = []
    for recogniser in recognisers:
        propose = getattr(recogniser, method, None)
        if propose is None:
            continue
        try:
            found.extend(h for h in propose(captured.module, captured) if h.op in region.ops)
        except Exception as error:  # noqa: BLE001 - a stranger's recogniser loses only its own
            left_alone.append((region.outputs[0].name, _raised(recogniser, error)))
    return found, captured


def _key(region: Region, captured: Captured, hypotheses: list[Hypothesis]) -> Hashable:
    """The region's own code, with what flows in and what is claimed; equal layers share a proof."""
    inner: Any = captured.module._code
    values = tuple((shape(n), example(n).dtype) for n in (*region.inputs, *region.weights.values()))
    targets = tuple(str(node.target) for node in region.nodes() or ())
    claims = tuple(h.claim for h in hypotheses)
    return (inner.__self__.code, targets, values, tuple(region.weights), region.kind, region.ops, claims)


def _affordable(region: Region) -> bool:
    """Whether a region whose smaller copy was not proved may be tried at its own size."""
    return sum(math.prod(shape(node) or ()) for node in region.weights.values()) <= _AFFORDABLE


def _site(region: Region, gm: GraphModule, captured: Captured, outcome: Outcome, sizes: Sizes) -> Site:
    assert outcome.hypothesis is not None
    seen, module = captured.tensors(), captured.module
    if sizes:  # what was seen, and weights of their own sizes that take no memory
        real = (_seen(node, {}) for node in region.inputs)
        seen = {name: value for name, value in zip(captured.names, real) if value is not None}
        module = RegionModule(region, gm, {}, {}, "meta")
    shown = Example(
        {name: str(value.dtype).removeprefix("torch.") for name, value in seen.items()},
        {name: value.shape for name, value in seen.items()},
        {},
        str(next(iter(seen.values())).device),
    )
    return Site(
        op=outcome.hypothesis.op,
        path=_home(region.outputs[0]),
        kind="graph",
        module=module,
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


def _autocasts(gm: GraphModule) -> bool:
    """Whether autocast is on around the graph or switched inside."""
    kinds = {"cpu"}
    for node in gm.graph.nodes:
        if node.op == "call_function" and "autocast" in getattr(node.target, "__name__", ""):
            return True
        if node.op == "placeholder" and isinstance(example(node), torch.Tensor):
            kinds.add(example(node).device.type)
    kinds.discard("meta")
    return any(torch.is_autocast_enabled(kind) for kind in kinds)


def homes(site: Site) -> frozenset[str]:
    """The paths of the modules whose forwards ran the nodes of a site in a graph."""
    return frozenset(_home(node) for node in site.module._region.nodes())  # type: ignore[union-attr, operator]


def parts(site: Site) -> frozenset[str]:
    """The ops that the op of a site in a graph is made of."""
    return site.module._region.parts  # type: ignore[union-attr, return-value]


def _home(node: Node) -> str:
    """The path of the innermost module whose forward ran this node ("" is the root), for people.

    Dynamo notes where it found each module, such as ``G['_forward'].__self__._modules['layers'].0``.
    """
    stack = node.meta.get("nn_module_stack") or {}
    source = str(next(reversed(list(stack.values())), ("",))[0])
    source = re.sub(r"\._modules\['([^']+)'\]", r".\1", source)
    found = re.match(r"(?:[A-Z]\['[^']*'\](?:\.__self__)?|self)(?:\.(.+))?$", source)
    return (found.group(1) or "") if found else ""
