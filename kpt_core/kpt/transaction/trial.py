"""Stage 5: apply, judge, time, undo. Whatever happens, a trial leaves no trace."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from kpt import compiling
from kpt.error_text import described
from kpt.judge import clock
from kpt.judge.codestate import CodeState
from kpt.judge.state import ModelState, untouched
from kpt.specs import LEVELS
from kpt.transaction import dispatch, memory, workspace
from kpt.transaction.applied import Applied, StepFailed
from kpt.transaction.arrival import load_of
from kpt.transaction.budget import BudgetSpent
from kpt.transaction.installed import plan_for
from kpt.transaction.judgement import Judgement

if TYPE_CHECKING:
    from kpt.judge.calls import Call
    from kpt.judge.clock import Timing
    from kpt.transaction.accuracy import Accuracy
    from kpt.transaction.baseline import Baseline
    from kpt.transaction.budget import Budget
    from kpt.transaction.observe import Observation
    from kpt.transaction.plan import Candidate, Plan

#: Where the first look leaves open which side is faster a trial is timed for as long again, or for this share
#: of what its set-up took: that is lost with the verdict,
_LONGER_LOOK = 0.2
#: but for at most this share of the time that it has left, since one that is stopped has no verdict at all.
_SHARE_TIMED = 0.8
#: Examples that a variant calibrates on.
_CALIBRATED = 4
#: Rules that compare values within a tolerance; a user's metric outranks these and no others.
_TOLERANCES = frozenset({"value", "size", "mask"})
_RULES_THAT_JUDGE = frozenset(
    {"value", "nan", "gradient", "shape", "size", "mask", "structure", "dtype", "replay", "unwritten"}
)


@dataclass
class Outcome:
    """How one trial ended. ``applied`` is alive only for an accepted trial, until it is closed.

    So is ``quiet``, the same plan on the model without dropout, by which values are judged where the
    outputs depend on random numbers. ``over_eager`` is how many times faster than the untouched model it is,
    through what it was timed against. ``beneath`` is the accepted outcome of a stricter level that it took
    the place of, alive as long as it is.
    """

    plan: Plan
    rule: str = "ok"
    reason: str = ""
    timing: Timing | None = None
    culprit: Candidate | None = None
    figures: dict[str, float] = field(default_factory=dict)
    setup_seconds: float = 0.0
    seconds: float = 0.0
    applied: Applied | None = None
    quiet: Applied | None = None
    over_eager: float = 0.0
    beneath: Outcome | None = None

    @property
    def right(self) -> bool:
        """The referee accepted, whatever the clock said."""
        return self.rule in ("ok", "slower")

    @property
    def accepted(self) -> bool:
        return self.rule == "ok"

    @property
    def judged_wrong(self) -> bool:
        return self.rule in _RULES_THAT_JUDGE

    def to_dict(self) -> dict[str, Any]:
        return {
            "plan": list(self.plan.names),
            "rule": self.rule,
            "reason": self.reason,
            "timing": self.timing.to_dict() if self.timing else None,
            "figures": self.figures,
            "setup_seconds": self.setup_seconds,
            "seconds": self.seconds,
        }

    def supersede(self, other: Outcome) -> None:
        """Take the place of ``other``, which is closed, or kept beneath where its level is the stricter.

        What a level allows may be right on the inputs of a trial and wrong on those of the commit.
        """
        known = [each for each in (self.beneath, other, other.beneath) if each is not None]
        self.beneath = other.beneath = None
        stricter = [each for each in known if each.plan.stricter_than(self.plan)]
        # The bolder of two is the faster one by what was tried; of one level the clock says which.
        kept = max(stricter, key=lambda each: (LEVELS.index(each.plan.level), each.over_eager), default=None)
        for each in known:
            if each is kept:
                self.beneath = each
            else:
                each.close()

    def close(self) -> None:
        self.hush()
        if self.applied is not None:
            self.applied.close()
            self.applied = None
        if self.beneath is not None:
            self.beneath.close()
            self.beneath = None

    def hush(self) -> None:
        """Free the application without dropout: nothing is judged any more."""
        if self.quiet is not None:
            self.quiet.close()
            self.quiet = None


class Trials:
    """Runs trials of one observation; holds what they share."""

    def __init__(
        self,
        observation: Observation,
        baseline: Baseline,
        budget: Budget,
        state: ModelState,
        *,
        accuracy: Accuracy | None = None,
    ) -> None:
        self.observation = observation
        self.baseline = baseline
        self.budget = budget
        self.accuracy = accuracy
        self.accuracy_before: float | None = None
        self.accuracy_after: dict[str, float] = {}
        self.judgement = Judgement(observation, baseline, budget)
        self.load = load_of(observation)
        self.state = state
        #: What plans are applied to copies of. A forward that registers hooks when it is first called does so
        #: eagerly, and not while a compiler looks on.
        self.source = baseline.plain if workspace.has_hooks(baseline.plain) else observation.model
        #: What the eager forward itself changes by being called is put back, and no pass is blamed for it.
        self.eager_changes = frozenset(state.differences())
        if self.eager_changes:
            state.restore()
        #: When the running trial is stopped, as a reading of ``time.perf_counter``.
        self._ends = 0.0
        self.log: list[Outcome] = []
        self.damage: list[str] = []
        self.code = CodeState(observation.model)
        self.patched: list[str] = []
        self.undo_errors: list[str] = []

    def run(
        self,
        plan: Plan,
        *,
        against: Applied | None = None,
        keep: bool = False,
        seconds: float | None = None,
        thorough: bool = False,
        timed: bool = True,
    ) -> Outcome:
        """Try ``plan``; time it against ``against``, or the untouched model.

        An accepted outcome keeps its workspace alive if ``keep``. ``seconds`` limits the trial below
        what is left of the budget.
        """
        started = time.perf_counter()
        left = self.budget.left()
        self._ends = started + (left if seconds is None else min(seconds, left))
        outcome = Outcome(plan)
        applied: list[Applied] = []
        harmed, patched = len(self.damage), len(self.patched)
        try:
            with self.untouched(), self.budget.limit(seconds):
                self._run(outcome, applied, against, thorough, timed)
        except BudgetSpent as error:
            outcome.rule, outcome.reason = "budget", str(error)
        except compiling.DeadlinePassed:
            outcome.rule, outcome.reason = "deadline", "the trial was stopped when its time was spent"
        except StepFailed as error:
            outcome.rule, outcome.reason, outcome.culprit = error.rule, error.reason, error.step
        except MemoryError as error:
            outcome.rule, outcome.reason = "memory", f"out of memory: {error}"
        except KeyboardInterrupt:
            _close_all(applied)
            raise
        except _AccuracyError as error:
            _close_all(applied)
            raise error.original from None
        except ModelDamaged:
            _close_all(applied)
            raise
        except BaseException as error:  # noqa: BLE001 - a plan may fail in any way; that ends its trial only
            outcome.rule = "memory" if memory.out_of_memory(error) else "failed"
            noted = [f"; logged: {note.strip()[:200]}" for note in getattr(error, "__notes__", ())]
            outcome.reason = f"{described(error)[:400]}" + "".join(noted[:2])
        if outcome.right or outcome.judged_wrong:
            if len(self.damage) > harmed:
                outcome.rule, outcome.reason = "parameter-modified", self.damage_since(harmed)
            if len(self.patched) > patched:
                outcome.rule, outcome.reason = "global-state", self.patches_since(patched)
        if keep and outcome.right and applied:
            outcome.applied = applied[0]
            outcome.quiet = applied[1] if len(applied) > 1 else None
        else:
            _close_all(applied)
        outcome.seconds = time.perf_counter() - started
        self.log.append(outcome)
        return outcome

    def _run(
        self, outcome: Outcome, holder: list[Applied], against: Applied | None, thorough: bool, timed: bool
    ) -> None:
        observation, plan = self.observation, outcome.plan
        draws = self.judgement.calls.draws(touches_mask=plan.touches_mask, thorough=thorough)
        if observation.stochastic:
            # Values are compared without dropout, on a second application of the same plan.
            holder.append(quiet := self._prepared(self.baseline.judged, plan))
            verdict = self.judgement.judge(quiet, draws)
            if verdict.passed:
                holder.insert(0, applied := self._prepared(self.source, plan))
                values, verdict = verdict, self.judgement.judge_dropout(applied)
                verdict.figures.update(values.figures)
        else:
            holder.append(applied := self._prepared(self.source, plan))
            verdict = self.judgement.judge(applied, draws)
        outcome.setup_seconds = holder[0].setup_seconds if holder else 0.0
        outcome.figures = dict(verdict.figures)
        if not verdict.passed and not self.overruled(verdict.rule):
            outcome.rule, outcome.reason = verdict.rule, verdict.detail
            return
        self._judge_accuracy(outcome, applied)
        if not outcome.right or not timed:
            return
        outcome.timing = self.time(applied, against)
        if observation.objective == "memory":
            self._judge_memory(outcome, applied)
        elif not outcome.timing.faster:
            outcome.rule = "slower"
            outcome.reason = (
                f"{outcome.timing.ratio:.2f}x, not faster beyond doubt (from {outcome.timing.low:.2f}x)"
            )

    def overruled(self, rule: str) -> bool:
        """Whether the user's own metric decides in place of a tolerance of the referee."""
        return self.accuracy is not None and not self.observation.training and rule in _TOLERANCES

    def _prepared(self, source: torch.nn.Module, plan: Plan) -> Applied:
        """``plan`` on a workspace of ``source``: warmed up, sealed, and seen to have an effect."""
        started = time.perf_counter()
        applied = Applied(
            source,
            plan,
            training=self.observation.training,
            run=self._run_examples,
            undo_errors=self.undo_errors,
        )
        try:
            runner = self.baseline.runner
            # What compiling leaves changed is put back here already: a judged call has to leave nothing.
            with untouched(), runner.buffers_kept():
                for call in self.warm_up_calls(plan):
                    runner.step(applied.forward, call)
            applied.seal()
            applied.setup_seconds = time.perf_counter() - started
            applied.verify()
        except BaseException:
            applied.close()
            raise
        return applied

    def _run_examples(self, forward: Callable[..., Any]) -> None:
        """Call ``forward`` on the first examples, as the mode demands."""
        runner = self.baseline.runner
        with untouched(), runner.buffers_kept():
            for call in self.observation.calls[:_CALIBRATED]:
                runner.step(forward, call.clone())

    def warm_up_calls(self, plan: Plan) -> list[Call]:
        """Calls of every kind that the plan will serve: what compiles or packs does it on these.

        The examples, and one of other sizes where dimensions are dynamic. A dynamic size of one is a
        kind of its own to compilers: it is prepared for where it is the batch, or an example has it.
        """
        observation, baseline = self.observation, self.baseline
        calls = [call.clone() for call in observation.calls]
        if observation.dynamic:
            for sizes in observation.spec.sizes(baseline.generator, 4):
                if min(sizes.values()) < 2:
                    continue
                call = baseline.draw(sizes=sizes)
                if baseline.runs(call):
                    calls += [call, *self._single(sizes)]
                    break
        if plan.touches_mask:
            calls.append(baseline.draw(padding=True))
        return calls

    def _single(self, sizes: dict[str, int]) -> list[Call]:
        """A call of batch size one, where the batch is dynamic and no example has that size."""
        spec, baseline = self.observation.spec, self.baseline
        batch = {leaf.dims[0] for leaf in spec.leaves if 0 in leaf.dims}
        wanted = {n for n in batch if spec.dimensions[n].low <= 1 and 1 not in spec.dimensions[n].observed}
        if not wanted:
            return []
        call = baseline.draw(sizes={name: 1 if name in wanted else size for name, size in sizes.items()})
        return [call] if baseline.runs(call) else []

    def time(self, applied: Applied, against: Applied | None = None) -> Timing:
        """Pair ``applied`` with the untouched model, or with another applied plan.

        What took long to set up is worth a longer look where the first leaves open which is faster.
        """
        runner, baseline, observation = self.baseline.runner, self.baseline, self.observation
        plain = against.forward if against is not None else baseline.plain.forward
        latency = max(observation.baseline_seconds, 1e-5)
        span = min(max(1.0, 16 * latency), 0.1 * self.budget.seconds)
        patience = min(max(span, _LONGER_LOOK * applied.setup_seconds), 0.1 * self.budget.seconds)
        now = time.perf_counter()
        with runner.buffers_kept():
            return clock.paired(
                lambda *args, **kwargs: runner.run(plain, args, kwargs),
                lambda *args, **kwargs: runner.run(applied.forward, args, kwargs),
                baseline.draw,
                seconds=min(span, self.budget.left()),
                patience=patience,
                warmup=2,
                # One that is stopped while it is timed has no result at all.
                deadline=now + _SHARE_TIMED * max(self._ends - now, 0.0),
                load=self.load,
            )

    def _judge_accuracy(self, outcome: Outcome, applied: Applied) -> None:
        if self.accuracy is None or applied.module is None:
            return
        try:
            if self.accuracy_before is None:
                untouched_copy = workspace.copy_of(self.baseline.plain)
                self.accuracy_before = self.accuracy.before(self._measure(self.accuracy, untouched_copy))
            with self._as_served(applied) as served:
                after = self._measure(self.accuracy, served)
        except (KeyboardInterrupt, compiling.DeadlinePassed):
            raise
        except BaseException as error:
            raise _AccuracyError(error) from error
        drop = self.accuracy.drop(self.accuracy_before, after)
        self.accuracy_after[outcome.plan.key] = after
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

    def _judge_memory(self, outcome: Outcome, applied: Applied) -> None:
        runner, plain = self.baseline.runner, self.baseline.plain
        call = self.baseline.draw()
        with runner.buffers_kept():
            kind = self.observation.device_type
            before = memory.peak_bytes(lambda: runner.step(plain.forward, call.clone()), kind)
            after = memory.peak_bytes(lambda: runner.step(applied.forward, call.clone()), kind)
        after += memory.derived_bytes(self.observation.model, applied)
        weights = self.observation.parameter_bytes
        outcome.figures.update(peak_bytes_before=weights + before, peak_bytes_after=weights + after)
        assert outcome.timing is not None
        if weights + after > 0.98 * (weights + before):
            outcome.rule = "slower"
            outcome.reason = f"peak memory {weights + after:.0f} bytes is not below {weights + before:.0f}"
        elif outcome.timing.high < 1.0:
            outcome.rule, outcome.reason = "slower", f"{outcome.timing.ratio:.2f}x"

    def damage_since(self, index: int) -> str:
        """What trials changed of the user's model, from the ``index``-th finding on."""
        return "it changed the user's model: " + ", ".join(sorted(set(self.damage[index:]))[:4])

    def patches_since(self, index: int) -> str:
        """What code trials exchanged for the whole process, from the ``index``-th finding on."""
        return "it changed code that all models share: " + ", ".join(sorted(set(self.patched[index:]))[:4])

    @contextmanager
    def state_kept(self) -> Iterator[None]:
        """Global state and the model's tensors are put back when the block ends; its modules are changed on
        purpose."""
        try:
            with untouched():
                yield
        finally:
            self._mend(self.state.tensor_differences(), self.state.restore_tensors)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Global state, shared code and the user's model are put back, however the block ends."""
        try:
            with untouched():
                yield
        finally:
            exchanged = self.code.differences()
            if exchanged:
                self.patched.extend(exchanged)
                self.code.restore()
            self._mend(self.state.differences(), self.state.restore)

    def _mend(self, differences: list[str], restore: Callable[[], list[str]]) -> None:
        if not differences:
            return
        self.damage.extend(name for name in differences if name not in self.eager_changes)
        lost = restore()
        if not lost:
            return
        large = [name for name in lost if name.rpartition(": ")[0] in self.state.unrestorable]
        if large:
            raise ModelDamaged(
                f"a plugin wrote to {', '.join(large[:4])}, which was too large to be backed up "
                "and could not be put back; load the weights again and leave that plugin out"
            )
        raise ModelDamaged(
            f"calls changed the model so that it could not be put back ({', '.join(lost[:4])}): a plugin, or "
            "its own forward, writes to what is no leaf; build it again, and leave that plugin out"
        )


class ModelDamaged(RuntimeError):
    """Something was changed that could not be put back, weights that no backup was kept of say. The only case
    in which a model is not as it was."""


class _AccuracyError(Exception):
    """The user's metric raised; the user gets the original exception."""

    def __init__(self, original: BaseException) -> None:
        super().__init__(str(original))
        self.original = original


def _close_all(applied: list[Applied]) -> None:
    for item in applied:
        item.close()
    applied.clear()
    gc.collect()
