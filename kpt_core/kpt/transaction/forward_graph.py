"""The graph of the untouched model, captured once where a kernel's op is in no module: what it holds."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kpt import compiling
from kpt.error_text import summary
from kpt.judge.state import untouched
from kpt.transaction import workspace
from kpt.transaction.execution import Runner
from kpt.transaction.observe import proof_seconds

if TYPE_CHECKING:
    import torch

    from kpt.ops.recognition import Recognition
    from kpt.ops.sites import Site
    from kpt.transaction.observe import Observation


@dataclass(frozen=True)
class GraphFindings:
    """The sites found in the graph, or the ``reason`` why there are none; ``seconds`` is what it took."""

    sites: tuple[Site, ...] = ()
    reason: str = ""
    seconds: float = 0.0


def look(observation: Observation, registry: Any, ops: frozenset[str]) -> GraphFindings:
    """Where the graph of the model's first example computes ``ops``.

    One eager run tells which of them can be there at all; only then is the forward captured. Whatever
    goes wrong, or takes longer than a small part of the budget, is a reason to find nothing.
    """
    started = time.perf_counter()
    if observation.unfinished_proofs:
        return GraphFindings(
            reason=f"{observation.unfinished_proofs} modules or functions, which may compute it, were not "
            "proved for lack of time; in the graph a kernel would take the place of parts of them"
        )
    seconds = proof_seconds(observation.budget_left)
    try:
        with untouched(), compiling.deadline(seconds):
            recognition = _recognise(observation, registry, ops, time.monotonic() + seconds)
    except KeyboardInterrupt:
        raise
    except compiling.DeadlinePassed:
        return GraphFindings(reason=f"the forward was not captured and recognised within {seconds:.1f} s")
    except BaseException as error:  # noqa: BLE001 - dynamo raises anything; then no kernel finds a region
        return GraphFindings(reason=f"dynamo cannot capture the forward ({summary(error)})")
    if recognition is None:
        return GraphFindings()
    unproved = "; ".join(f"{name}: {why}" for name, why in recognition.left_alone[:3])
    reason = f"no region of the captured graph was proved ({unproved})" if unproved else ""
    return GraphFindings(recognition.sites, reason, time.perf_counter() - started)


def _recognise(
    observation: Observation, registry: Any, ops: frozenset[str], deadline: float
) -> Recognition | None:
    from kpt.ops import recognise_graph
    from kpt.ops.presence import possible_ops

    plain = workspace.clone(observation.model)
    runner = Runner(plain, training=observation.training)
    call = observation.calls[0]
    with runner.buffers_kept():
        first = call.clone()
        present = ops & possible_ops(lambda: plain.forward(*first.args, **first.kwargs), registry)
        if not present:
            return None
        graphs: list[torch.fx.GraphModule] = []

        def keep(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
            graphs.append(graph)
            return graph.forward

        forward = compiling.CompiledForward(plain.forward, backend=keep, label="looking for regions")
        try:
            runner.step(forward, call.clone())
        finally:
            forward.dispose()
    return recognise_graph(
        graphs[0], registry=registry, deadline=deadline, training=observation.training, only=present
    )
