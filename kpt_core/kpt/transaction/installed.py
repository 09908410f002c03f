"""The guarded plan that serves calls of a model, at a commit and while a user's metric is measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpt.transaction.guard import InputGuard
from kpt.transaction.memory import holds_copies
from kpt.transaction.serving import Plan
from kpt.transaction.watch import Watch

if TYPE_CHECKING:
    import torch

    from kpt.transaction.applied import Applied
    from kpt.transaction.observe import Observation


def plan_for(model: torch.nn.Module, applied: Applied, observation: Observation) -> Plan:
    """``applied`` behind the guard of ``observation``, watching ``model`` until ``plan.watch.close()``.

    The weights are watched if the plan says that it derives copies from them, or holds tensors that may be
    such copies. In training a copy shows in the gradients, and weights change with every step.
    """
    weights = applied.plan.derives or (not observation.training and holds_copies(model, applied))
    return Plan(
        model,
        applied.forward,
        InputGuard(list(observation.calls), observation.spec, training=observation.training),
        Watch(model, weights=weights, moving=observation.moving),
        training=observation.training,
        executions=applied.executions,
        ambient=observation.ambient,
        direct=applied.direct,
        misses=applied.misses,
        writes_inputs=observation.writes_inputs,
        detached=observation.detached,
        unrepeatable=observation.unrepeatable,
    )
