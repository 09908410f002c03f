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

from kpt.compiling.graph_parts import Part, changes_in_place, signature

#: Operations that must not be compiled again for a cut to pay, at least, and their share of the graph.
_LEAST, _LEAST_SHARE = 32, 0.1

Compile = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


class RepeatedParts:
    """A backend for `CompiledForward` that compiles each distinct part of a graph once.

    ``backend`` is the name of a dynamo backend or a function of (graph, example inputs); what it is given
    are fake tensors. ``parts`` counts the parts that were found in all graphs, ``distinct`` those compiled.

    Raises `RuntimeError` for a graph in which nothing repeats that may be cut: tensors that are changed in
    place, and switches such as `torch.no_grad`, stay in one part with all that comes before them.
    """

    def __init__(self, backend: str | Compile = "inductor") -> None:
        self.backend = backend
        self.parts = 0
        self.distinct = 0

    def __call__(self, graph: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        nodes = [n for n in graph.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
        fixed = max((i + 1 for i, node in enumerate(nodes) if changes_in_place(node)), default=0)
        ranges = _ranges(nodes, fixed)
        if len(ranges) < 2:
            raise RuntimeError(
                f"no block repeats among the {len(nodes) - fixed} operations of the graph that may be cut "
                f"(of {len(nodes)}); compile it whole"
            )
        compile_part = self.backend
        if isinstance(compile_part, str):
            compile_part = torch._dynamo.lookup_backend(compile_part)
        return self._joined(graph, [nodes[start:end] for start, end in ranges], compile_part)

    def _joined(
        self, graph: fx.GraphModule, groups: list[list[fx.Node]], compile_part: Compile
    ) -> Callable[..., Any]:
        """The graph with a call in place of each group of nodes."""
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
        compiled: dict[Any, Callable[..., Any]] = {}
        for group in groups:
            part = Part(graph, group)
            call = compiled.get(part.key)
            if call is None:
                call = compiled[part.key] = _as_function(part.compiled_by(compile_part), len(compiled))
            result = outer.call_function(call, tuple(made[node] for node in part.inputs))
            for number, node in enumerate(part.outputs):
                made[node] = outer.call_function(operator.getitem, (result, number))
        (end,) = graph.graph.find_nodes(op="output")
        outer.node_copy(end, made.__getitem__)
        self.parts += len(groups)
        self.distinct += len(compiled)
        joined: Callable[..., Any] = fx.GraphModule(holder, outer).forward
        return joined


def _as_function(compiled: Callable[..., Any], number: int) -> Callable[..., Any]:
    """``compiled`` under a name of its own: the generated code of a graph refers to functions by name."""

    def part(*inputs: Any) -> Any:
        return compiled(*inputs)

    part.__name__ = part.__qualname__ = f"part_{number}"
    return part


def _ranges(nodes: list[fx.Node], fixed: int) -> list[tuple[int, int]]:
    """Where to cut: (start, end) of each part, in order; one range where cutting does not pay.

    The first ``fixed`` nodes stay in one part.
    """
    numbers: dict[Any, int] = {}
    kinds = torch.tensor([numbers.setdefault(signature(node), len(numbers)) for node in nodes])
    crossing = _crossing(nodes)
    least = max(_LEAST, int(_LEAST_SHARE * len(nodes)))
    cuts = {0, fixed, len(nodes)} if fixed else {0, len(nodes)}
    waiting = [(fixed, len(nodes))]
    found = False
    while waiting:
        start, end = waiting.pop()
        run = _longest_repetition(kinds[start:end])
        if run is None or run[0] < least:
            continue
        _, period, offset, length = run
        repeated = _phase(crossing, start + offset, length, period)
        found = True
        cuts.update(repeated)
        waiting += [(start, repeated[0]), (repeated[-1], end)]
    ordered = sorted(cuts) if found else [0, len(nodes)]
    return [(start, end) for start, end in zip(ordered, ordered[1:], strict=False) if start < end]


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
        edges = torch.cat([torch.tensor([-1]), differs, torch.tensor([count - period])])
        gaps = edges.diff() - 1
        widest = int(gaps.argmax())
        length = int(gaps[widest]) + period
        saved = (length // period - 1) * period
        if saved > 0 and (best is None or saved > best[0]):
            best = saved, period, int(edges[widest]) + 1, length
    return best


def _phase(crossing: list[int], start: int, length: int, period: int) -> list[int]:
    """The cuts between periods, shifted to where the fewest values cross them; one period may be lost."""
    full = length // period
    options: list[tuple[float, int, list[int]]] = []
    for shift in range(period):
        periods = (length - shift) // period
        if periods >= max(2, full - 1):
            cuts = [start + shift + number * period for number in range(periods + 1)]
            options.append((sum(crossing[cut] for cut in cuts) / len(cuts), -periods, cuts))
    return min(options)[2]


def _crossing(nodes: list[fx.Node]) -> list[int]:
    """How many values are made before each position and used at or after it."""
    place = {node: number for number, node in enumerate(nodes)}
    steps = [0] * (len(nodes) + 2)
    for number, node in enumerate(nodes):
        last = max((place.get(user, len(nodes)) for user in node.users), default=number)
        steps[number + 1] += 1
        steps[last + 1] -= 1
    return list(_sums(steps))


def _sums(values: Iterable[int]) -> Iterator[int]:
    total = 0
    for value in values:
        total += value
        yield total
