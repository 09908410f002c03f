"""The user's own metric, taken of plans as they would serve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch

from kpt.interruption import DeadlinePassed
from kpt.judge.state import ModelState, untouched
from kpt.transaction import dispatch, workspace
from kpt.transaction.installed import plan_for

if TYPE_CHECKING:
    from kpt.transaction.accuracy import Accuracy
    from kpt.transaction.applied import Applied
    from kpt.transaction.baseline import Baseline
    from kpt.transaction.observe import Observation
    from kpt.transaction.outcome import Outcome

#: Rules that compare values within a tolerance; a user's metric outranks these and no others.
_TOLERANCES = frozenset({"value", "size", "mask"})


class Metric:
    """``before`` is that of the untouched model, ``after`` of each plan, by its key."""

    def __init__(
        self, accuracy: Accuracy | None, observation: Observation, baseline: Baseline, state: ModelState
    ) -> None:
        self.accuracy = accuracy
        self.observation = observation
        self.baseline = baseline
        self.state = state
        self.before: float | None = None
        self.after: dict[str, float] = {}

    def overrules(self, rule: str) -> bool:
        """Whether the metric decides in place of a tolerance of the referee."""
        return self.accuracy is not None and not self.observation.training and rule in _TOLERANCES

    def judge(self, outcome: Outcome, applied: Applied) -> None:
        """Refuse ``outcome`` where the metric fell by more than its user allows.

        Raises:
            MetricError: the metric raised.
        """
        if self.accuracy is None or applied.module is None:
            return
        try:
            if self.before is None:
                untouched_copy = workspace.copy_of(self.baseline.plain)
                self.before = self.accuracy.before(self._measure(self.accuracy, untouched_copy))
            with self._as_served(applied) as served:
                after = self._measure(self.accuracy, served)
        except (KeyboardInterrupt, DeadlinePassed):
            raise
        except BaseException as error:
            raise MetricError(error) from error
        drop = self.accuracy.drop(self.before, after)
        self.after[outcome.plan.key] = after
        outcome.figures["accuracy_drop"] = drop
        if drop > self.accuracy.max_drop:
            outcome.rule = "accuracy"
            outcome.reason = (
                f"the metric fell by {drop:.4g} to {after:.4g}; at most {self.accuracy.max_drop:.4g} allowed"
            )

    @contextmanager
    def _as_served(self, applied: Applied) -> Iterator[torch.nn.Module]:
        """A copy of the model that serves calls as a committed one does: what the plan was not proven for
        (another mode, of a submodule too) runs the original forward."""
        served = workspace.copy_of(self.baseline.plain)
        plan = plan_for(served, applied, self.observation)
        uninstall = dispatch.install(served, plan)
        try:
            yield served
        finally:
            plan.watch.close()
            with suppress(RuntimeError):  # the metric wrapped the copy's forward for good
                uninstall()
            served.__dict__.pop(dispatch.HANDLE, None)

    def _measure(self, accuracy: Accuracy, module: torch.nn.Module) -> float:
        """The metric of ``module``, a copy of the model made for it: its modes, hooks and structure are
        the metric's to change. What it does to the tensors, which are shared, is put back."""
        try:
            with untouched():
                return accuracy.measure(module)
        finally:
            if self.state.differences():
                self.state.restore()


class MetricError(Exception):
    """The user's metric raised; the user gets the original exception."""

    def __init__(self, original: BaseException) -> None:
        super().__init__(str(original))
        self.original = original
