"""Kernels for arithmetic that a forward writes out inline: at regions of the graph that dynamo captures.

A plan with such kernels lets dynamo capture the forward. What the graph computes is recognised when it
is captured, with all that the plan changed before, and calls of the kernels take the place of the
regions. The rest of the graph runs as it was captured, or through the plan's compiler, which takes the
substitution over as a pass on its own graph. Gradients flow as they would in the model's own code: the
graph is changed before autograd sees it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from kpt import kernels, plugins
from kpt.compiling import CapturedForward
from kpt.ops.index import catalogue
from kpt.plugins.validation import nearest
from kpt.specs import KernelSpec, Undo, Variant, replace_forward

if TYPE_CHECKING:
    from kpt.ops.sites import Site

#: Seconds that proofs may take while one graph is captured; what was proved before costs nothing.
_PROOF_SECONDS = 20.0
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class Found(Protocol):
    """What the graph of the untouched model holds."""

    @property
    def sites(self) -> tuple[Site, ...]: ...

    @property
    def reason(self) -> str: ...

    @property
    def seconds(self) -> float: ...


@dataclass(eq=False)
class GraphKernelBehaviour(kernels.KernelBehaviour):
    """The `Pass` of one kernel at regions of the model's graph; ``sites`` are those of the untouched model.

    ``replaced`` are the regions that it serves, by name, once graphs were captured.
    """

    mode: str = "inference"
    dims: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    seconds: float = 0.0
    replaced: dict[str, None] = field(default_factory=dict)

    def propose(self, observation: Any, hardware: Any) -> list[Variant]:
        names = sorted(site.name for site in self.sites)
        return [
            Variant(
                name=f"{self.spec.op}/{self.spec.name}",
                params={"regions": names},
                predicted_gain=kernels.predicted(self.spec, observation, hardware, self.sites),
                setup_seconds=self.seconds,
                reproducible=self.spec.reproducible,
            )
        ]

    def apply(self, model: torch.nn.Module, variant: Variant) -> Undo:
        self.tables, self.traced, self.replaced = [], False, {}
        current = model.forward
        if isinstance(current, CapturedForward) and isinstance(current.graph_pass, GraphKernels):
            shared = current.graph_pass  # another kernel's: one graph serves all
            shared.behaviours.append(self)
            return lambda: shared.behaviours.remove(self)
        captured = CapturedForward(
            current, GraphKernels([self]), dynamic_dims=self.dims, label=type(model).__name__
        )
        put_back = replace_forward(model, captured)

        def undo() -> None:
            put_back()
            captured.dispose()

        return undo

    def at(self, site: Site) -> Callable[..., Any]:
        """What is called at ``site``: the kernel, for all that the site was judged with."""
        table = kernels.SiteTable(site.name)
        self.tables.append(table)
        self.replaced[site.name] = None
        kernel: Any = plugins.load(self.spec.entry)
        reference = self.reference()
        behaviour = self

        def serve(**arguments: Any) -> Any:
            if any(isinstance(v, torch.Tensor) and type(v) not in _PLAIN for v in arguments.values()):
                behaviour.note_traced()  # a compiler runs the graph on stand-ins
                return kernel(**arguments)
            if table.admits((), arguments):
                return kernel(**arguments)
            return reference(**arguments)

        serve.__name__ = f"{self.spec.op}_{self.spec.name}"
        return serve

    def effect(self) -> str:
        """What it changed, for the receipt."""
        names = list(self.replaced)
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        told = f"replaces {len(names)} regions of the captured graph: {', '.join(names[:8])}{more}"
        return f"{told}{self._said_of_others()}"

    def may_serve(self, site: Site) -> bool:
        """Whether a region of this form was judged: with other dtypes it may be, where the plan casts."""
        if not self.left_out:
            return True
        judged = [[dict(shown.shapes) for shown in other.examples] for other in self.sites]
        return [dict(shown.shapes) for shown in site.examples] in judged


class GraphKernels:
    """A graph pass that puts the kernels of ``behaviours`` where a graph computes their ops."""

    def __init__(self, behaviours: Iterable[GraphKernelBehaviour]) -> None:
        self.behaviours = list(behaviours)

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Any]) -> torch.fx.GraphModule:
        from kpt import ops

        serving = {behaviour.spec.op: behaviour for behaviour in self.behaviours}
        if not serving:
            return graph
        first = self.behaviours[0]
        found = ops.recognise_graph(
            graph,
            registry=first.registry,
            training=first.mode == "training",
            deadline=time.monotonic() + _PROOF_SECONDS,
            only=serving.keys(),
        )
        usable = [
            site
            for op, behaviour in serving.items()
            for site in kernels.supported(behaviour.spec, found.of(op), behaviour.mode)[0]
            if behaviour.may_serve(site)
        ]
        for site in ops.graph_sites(usable):
            ops.substitute(graph, site, serving[site.op].at(site))
        return graph


def wanted(registered: Any, registry: Any) -> bool:
    """Whether a kernel whose op no module computes may be put into a graph."""
    from kpt.ops.presence import marks

    spec: KernelSpec = registered.spec
    return spec.op in marks(registry) and spec.compile_safe and spec.setup is None


def _without_site(op: str, registry: Any, left_alone: Iterable[tuple[str, str]]) -> str:
    """Why a kernel of ``op`` has no site: nothing was recognised, nothing could be, or no such op exists.

    ``left_alone`` are places of the model with the reasons why nothing was recognised there.
    """
    known = catalogue(registry)
    if op not in known:
        return f"there is no op {op!r}; {nearest(op, known)}"
    recogniser = known[op].recogniser
    if recogniser is None:
        return "kpt does not recognise sites of this op in models; call it directly"
    raised = f"the recogniser {recogniser.rpartition(':')[2]} raised "
    return next(
        (why for _, why in left_alone if why.startswith(raised)),
        f"nothing in the model was recognised as {op}",
    )


def propose(
    siteless: Iterable[Any],
    observation: Any,
    registry: Any,
    proposals: Any,
    look: Callable[[frozenset[str]], Found],
) -> None:
    """Add a candidate for each kernel of ``siteless`` that some region of the model's graph can use.

    ``look(ops)`` captures the graph and recognises these ops in it; it is called only if a kernel needs it.
    """
    siteless = list(siteless)
    hopeful = [registered for registered in siteless if wanted(registered, registry)]
    found = look(frozenset(registered.spec.op for registered in hopeful)) if hopeful else None
    usable: list[tuple[Any, list[Site]]] = []
    for registered in siteless:
        spec: KernelSpec = registered.spec
        sites: list[Site] = []
        reason = _without_site(spec.op, registry, observation.left_alone)
        if found is not None and wanted(registered, registry):
            sites, refusal = kernels.supported(spec, found.sites, observation.mode)
            reason = refusal or found.reason or reason
        if sites:
            usable.append((registered, sites))
        else:
            proposals.skip(f"{spec.op}/{spec.name}", registered.plugin, "kernels", reason)
    modules = list(proposals.candidates)
    for registered, sites in usable:
        assert found is not None
        _offer(registered, sites, usable, modules, observation, registry, proposals, found.seconds)


def _offer(
    registered: Any,
    sites: list[Site],
    usable: list[tuple[Any, list[Site]]],
    modules: list[Any],
    observation: Any,
    registry: Any,
    proposals: Any,
    seconds: float,
) -> None:
    spec: KernelSpec = registered.spec
    make = functools.partial(
        GraphKernelBehaviour,
        spec,
        tuple(sites),
        mode=observation.mode,
        registry=registry,
        dims={leaf.name: dict(leaf.dims) for leaf in observation.spec.leaves if leaf.dims},
        seconds=seconds,
    )
    # Of two kernels for the same arithmetic a plan holds one: beside the other it would have no effect.
    conflicts = {f"graph:{spec.op}"}
    for other, theirs in usable:
        if other.spec.op != spec.op and _covers(theirs, sites):
            conflicts.add(f"graph:{other.spec.op}")
    for candidate in modules:
        if candidate.kernel and (_inside(sites, candidate.variant.sites) or _part(sites, candidate)):
            conflicts.update(candidate.provides)
    for variant in kernels.variants_of(make(), observation, registered, proposals):
        proposals.offer(
            variant=variant,
            phase="kernels",
            kernel=True,
            plugin=registered.plugin,
            source=variant.name,
            make=make,
            level=spec.level,
            dtypes=spec.dtypes,
            provides=frozenset({f"kernel:{spec.op}", f"graph:{spec.op}"}),
            conflicts=frozenset(conflicts),
            priority=spec.priority,
        )


def _covers(larger: Iterable[Site], smaller: Iterable[Site]) -> bool:
    """Whether every one of ``smaller`` overlaps with a site among ``larger`` that has more nodes."""
    larger = list(larger)
    return all(
        any(len(big.nodes) > len(small.nodes) and set(big.nodes) & set(small.nodes) for big in larger)
        for small in smaller
    )


def _inside(sites: Iterable[Site], paths: Iterable[str]) -> bool:
    """Whether a region of ``sites`` has nodes of a module at ``paths``, whose kernel replaces them."""
    from kpt.ops.graph import homes

    owned = [path for path in paths if path and ":" not in path]
    return any(
        home == path or home.startswith(f"{path}.")
        for site in sites
        for home in homes(site)
        for path in owned
    )


def _part(sites: Iterable[Site], candidate: Any) -> bool:
    """Whether the function of a candidate's site is a part of a region of ``sites``, in the same forward."""
    from kpt.ops.graph import homes, parts

    paths = {path.rpartition(":")[0] for path in candidate.variant.sites if ":" in path}
    paths = {"" if path == "(root)" else path for path in paths}
    return any(
        f"kernel:{part}" in candidate.provides and paths & homes(site)
        for site in sites
        for part in parts(site)
    )
