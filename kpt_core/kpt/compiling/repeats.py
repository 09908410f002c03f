"""Graphs of models that repeat a block: cut where the blocks meet, and compiled once for each distinct part.

Compilers take a time that grows with the number of operations, and most models do the same operations layer
after layer with other weights. Weights are inputs of a captured graph, so that one compiled part serves all
layers. What it costs is that nothing is fused over the cuts, and a call for each part.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx

from kpt.compiling.graph_parts import Part, signature
from kpt.compiling.writes import unbroken, value_of, written_by

#: Operations that must not be compiled again for a cut to pay, at least, and their share of the graph.
_LEAST, _LEAST_SHARE = 32, 0.1
#: Values that cross where nothing may be cut.
_NEVER = 10**9

Compile = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


class RepeatedParts:
    """A backend for `CompiledForward` that compiles each distinct part of a graph once.

    ``backend`` is the name of a dynamo backend or a function of (graph, example inputs); what it is given
    are fake tensors. ``parts`` counts the parts that were found in all graphs, ``distinct`` those compiled.
    After `across` it serves the graphs of several modules: one in which nothing repeats is a part as a whole.

    Raises `RuntimeError` for a graph in which nothing repeats that may be cut: a write in place stays in one
    part with what made the tensor, and switches such as `torch.no_grad` with all that comes before them. A
    graph that changes shapes in place is not cut at all.
    """

    def __init__(self, backend: str | Compile = "inductor") -> None:
        self.backend = backend
        self.parts = 0
        self.distinct = 0
        self._known: dict[Any, tuple[Callable[..., Any], Part]] | None = None

    def across(self) -> RepeatedParts:
        """Itself, for the modules of a model that is no single graph."""
        self._known = {} if self._known is None else self._known
        return self

    def clear(self) -> None:
        """Let go of the code that `across` keeps, and of what it was made for."""
        if self._known is not None:
            self._known.clear()

    def __call__(self, graph: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        nodes = [n for n in graph.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
        whole = unbroken(nodes)
        ranges = _ranges(nodes, whole)
        parts = _parts(graph, [nodes[start:end] for start, end in ranges])
        if any(start > 0 for start, _ in whole) and any(part.strides_differ for part in parts):
            raise RuntimeError(
                "tensors are changed in place, and a pass over the graph gave others strides that were not "
                "recorded, so that views may be copies or copies views; compile it whole"
            )
        distinct = {part.key: part for part in reversed(parts)}
        saved = len(nodes) - sum(len(part.nodes) for part in distinct.values())
        known = self._known
        if saved < _least(len(nodes)) and known is None:
            longest = max(whole, key=lambda each: each[1] - each[0], default=(0, 0))
            last = f" for {nodes[longest[1] - 1].name}, which writes in place or the like" if whole else ""
            raise RuntimeError(
                f"no block repeats among the {len(nodes)} operations of the graph; "
                f"{longest[1] - longest[0]} of them have to stay together{last}: compile it whole"
            )
        compile_part = self.backend
        if isinstance(compile_part, str):
            compile_part = torch._dynamo.lookup_backend(compile_part)
        calls: dict[Any, Callable[..., Any]] = {}
        for number, (key, part) in enumerate(reversed(distinct.items())):
            shared = known is not None and _may_be_shared(part)
            before = known.get(key) if known is not None and shared else None
            compiled = before[0] if before is not None else part.compiled_by(compile_part)
            if known is not None and shared and before is None:
                known[key] = compiled, part  # the part keeps alive what the key names
            self.distinct += before is None
            calls[key] = _as_function(compiled, number)
        self.parts += len(parts)
        return _joined(graph, parts, calls)


def _may_be_shared(part: Part) -> bool:
    """Whether the key of a part says all that its code depends on, in other graphs too.

    It names bodies of operators by numbers of their graph, symbolic sizes by those of their environment, and
    does not say which inputs share the memory that is written to.
    """
    values = torch.utils._pytree.tree_leaves([value_of(node) for node in part.graph.nodes])
    symbolic = any(
        isinstance(each, torch.SymInt)
        or (isinstance(each, torch.Tensor) and any(isinstance(size, torch.SymInt) for size in each.shape))
        for each in values
    )
    bodies = any(node.op == "get_attr" for node in part.graph.nodes)
    return not (symbolic or bodies or any(written_by(node) for node in part.nodes))


def _parts(graph: fx.GraphModule, groups: list[list[fx.Node]]) -> list[Part]:
    """The groups of nodes as parts, each with the values that those before it yield."""
    known: dict[fx.Node, Any] = {}
    results: dict[Any, tuple[Any, ...]] = {}
    parts: list[Part] = []
    for group in groups:
        part = Part(graph, group, known)
        if part.key not in results and len(groups) > 1:
            results[part.key] = part.results()
            if part.written and parts:
                # Equal parts share their fake values: two inputs may be one to the compiler.
                names = ", ".join(node.name for node in part.written)
                raise RuntimeError(
                    f"one of {part.nodes[0].name} to {part.nodes[-1].name} writes to memory of {names}, made "
                    "before it, and was not known to write; compile it whole"
                )
        known.update(zip(part.outputs, results.get(part.key, ()), strict=False))
        parts.append(part)
    return parts


def _joined(
    graph: fx.GraphModule, parts: list[Part], calls: dict[Any, Callable[..., Any]]
) -> Callable[..., Any]:
    """The graph with a call in place of the nodes of each part."""
    outer, made = fx.Graph(), dict[fx.Node, fx.Node]()
    holder = torch.nn.Module()
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            made[node] = outer.node_copy(node)
        elif node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(graph)
            if isinstance(value, torch.Tensor):  # modules are bodies of operators: their part has them
                name = f"constant_{len(made)}"
                holder.__dict__[name] = value
                made[node] = outer.create_node("get_attr", name)
    for part in parts:
        result = outer.call_function(calls[part.key], tuple(made[node] for node in part.inputs))
        for number, node in enumerate(part.outputs):
            made[node] = outer.call_function(operator.getitem, (result, number))
    (end,) = graph.graph.find_nodes(op="output")
    outer.node_copy(end, made.__getitem__)
    joined: Callable[..., Any] = fx.GraphModule(holder, outer).forward
    return joined


def _as_function(compiled: Callable[..., Any], number: int) -> Callable[..., Any]:
    """``compiled`` under a name of its own: the generated code of a graph refers to functions by name."""

    def part(*inputs: Any) -> Any:
        return compiled(*inputs)

    part.__name__ = part.__qualname__ = f"part_{number}"
    return part


def _ranges(nodes: list[fx.Node], whole: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Where to cut: (start, end) of each part, in order; one range where cutting does not pay.

    None of the ranges in ``whole`` is divided. The longest of them that begins with the graph is a part.
    """
    numbers: dict[Any, int] = {}
    kinds = _tensor([numbers.setdefault(signature(node), len(numbers)) for node in nodes])
    crossing = _crossing(nodes)
    least = _least(len(nodes))
    for start, end in whole:
        crossing[start + 1 : end] = [_NEVER] * (end - start - 1)
    fixed = max((end for start, end in whole if start == 0), default=0)
    while crossing[fixed] >= _NEVER:
        fixed += 1
    cuts = {0, fixed, len(nodes)}
    waiting = [(fixed, len(nodes))]
    found = False
    while waiting:
        start, end = waiting.pop()
        run = _longest_repetition(kinds[start:end])
        if run is None or run[0] < least:
            continue
        _, period, offset, length = run
        repeated = _phase(crossing, start + offset, length, period)
        if not repeated:
            continue
        found = True
        cuts.update(repeated)
        waiting += [(start, repeated[0]), (repeated[-1], end)]
    ordered = sorted(cuts) if found else [0, len(nodes)]
    return [(start, end) for start, end in zip(ordered, ordered[1:], strict=False) if start < end]


def _least(nodes: int) -> int:
    return max(_LEAST, int(_LEAST_SHARE * nodes))


def _tensor(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")  # whatever the user's default device is


def _longest_repetition(kinds: torch.Tensor) -> tuple[int, int, int, int] | None:
    """(saved, period, start, length) of the sequence of periods that saves most, or None.

    ``saved`` counts the elements of all periods but the first.
    """
    best: tuple[int, int, int, int] | None = None
    count = len(kinds)
    for period in range(1, count // 2 + 1):
        differs = (kinds[period:] != kinds[:-period]).nonzero().flatten()
        if count - period - len(differs) < period:
            continue
        edges = torch.cat([_tensor([-1]), differs, _tensor([count - period])])
        gaps = edges.diff() - 1
        widest = int(gaps.argmax())
        length = int(gaps[widest]) + period
        saved = (length // period - 1) * period
        if saved > 0 and (best is None or saved > best[0]):
            best = saved, period, int(edges[widest]) + 1, length
    return best


def _phase(crossing: list[int], start: int, length: int, period: int) -> list[int]:
    """The cuts between periods, shifted to where the fewest values cross them; one period may be lost.

    Empty where each shift would cut what has to stay together.
    """
    full = length // period
    options: list[tuple[float, int, list[int]]] = []
    for shift in range(period):
        periods = (length - shift) // period
        cuts = [start + shift + number * period for number in range(periods + 1)]
        if periods >= max(2, full - 1) and all(crossing[cut] < _NEVER for cut in cuts):
            options.append((sum(crossing[cut] for cut in cuts) / len(cuts), -periods, cuts))
    return min(options)[2] if options else []


def _crossing(nodes: list[fx.Node]) -> list[int]:
    """How many values are made before each position and used at or after it.

    Compilers take no tuple as an input: one counts as many.
    """
    place = {node: number for number, node in enumerate(nodes)}
    steps = [0] * (len(nodes) + 2)
    for number, node in enumerate(nodes):
        last = max((place.get(user, len(nodes)) for user in node.users), default=number)
        weight = 1000 if isinstance(value_of(node), (tuple, list)) else 1
        steps[number + 1] += weight
        steps[last + 1] -= weight
    return list(_sums(steps))


def _sums(values: Iterable[int]) -> Iterator[int]:
    total = 0
    for value in values:
        total += value
        yield total
