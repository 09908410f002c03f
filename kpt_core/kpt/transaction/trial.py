"""Stage 5: apply, judge, time, undo. Whatever happens, a trial leaves no trace."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from kpt.error_text import summary
from kpt.interruption import DeadlinePassed
from kpt.judge import clock, spans
from kpt.judge.state import ModelState, untouched
from kpt.transaction import memory, workspace
from kpt.transaction.applied import Applied, StepFailed
from kpt.transaction.arrival import load_of
from kpt.transaction.budget import BudgetSpent
from kpt.transaction.judgement import Judgement
from kpt.transaction.metric import Metric, MetricError
from kpt.transaction.outcome import Outcome
from kpt.transaction.safekeeping import ModelDamaged, Safekeeping

if TYPE_CHECKING:
    from kpt.judge.calls import Call
    from kpt.judge.timing import Timing
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
        probed: float = 0.0,
    ) -> None:
        self.observation = observation
        self.baseline = baseline
        self.budget = budget
        self.metric = Metric(accuracy, observation, baseline, state)
        self.judgement = Judgement(observation, baseline, budget, overruled=self.metric.overrules)
        #: Seconds until here that a later process with a recipe spends as well: all but those in which the
        #: hardware was ``probed``.
        self.began = budget.spent() - probed
        self.load = load_of(observation)
        self.kept = Safekeeping(observation.model, state)
        #: What plans are applied to copies of. A forward that registers hooks when it is first called does so
        #: eagerly, and not while a compiler looks on.
        self.source = baseline.plain if workspace.has_hooks(baseline.plain) else observation.model
        #: When the running trial is stopped, as a reading of ``time.perf_counter``.
        self._ends = 0.0
        self.log: list[Outcome] = []
        self.undo_errors: list[str] = []
        #: Steps that gave their levels to plans which were right on as many calls as a commit makes.
        self._well_judged: set[Candidate] = set()

    def run(
        self,
        plan: Plan,
        *,
        against: Applied | None = None,
        keep: bool = False,
        seconds: float | None = None,
        final: bool = False,
        timed: bool = True,
    ) -> Outcome:
        """Try ``plan``; time it against ``against``, or the untouched model.

        An accepted outcome keeps its workspace alive if ``keep``. ``seconds`` limits the trial below
        what is left of the budget. A ``final`` one, of a plan beside which there is no other, judges on as
        many calls as a commit does, which then need not. So does each of a step that gives its plan a level
        above exact, until one was right, but there the commit judges again: the fastest of many may be right
        by chance.
        """
        started = time.perf_counter()
        left = self.budget.left()
        self._ends = started + (left if seconds is None else min(seconds, left))
        outcome = Outcome(plan, final=final)
        applied: list[Applied] = []
        kept = self.kept
        harmed, patched = len(kept.damage), len(kept.patched)
        try:
            with kept.untouched(), self.budget.limit(seconds):
                self._run(outcome, applied, against, timed)
        except BudgetSpent as error:
            outcome.rule, outcome.reason = "budget", str(error)
        except DeadlinePassed:
            outcome.rule, outcome.reason = "deadline", "the trial was stopped when its time was spent"
        except StepFailed as error:
            outcome.rule, outcome.reason, outcome.culprit = error.rule, error.reason, error.step
        except MemoryError as error:
            outcome.rule, outcome.reason = "memory", f"out of memory: {error}"
        except KeyboardInterrupt:
            _close_all(applied)
            raise
        except MetricError as error:
            _close_all(applied)
            raise error.original from None
        except ModelDamaged:
            _close_all(applied)
            raise
        except BaseException as error:  # noqa: BLE001 - a plan may fail in any way; that ends its trial only
            outcome.rule = "memory" if memory.out_of_memory(error) else "failed"
            noted = [f"; logged: {note.strip()[:200]}" for note in getattr(error, "__notes__", ())]
            outcome.reason = summary(error) + "".join(noted[:2])
        if outcome.right or outcome.judged_wrong:
            if len(kept.damage) > harmed:
                outcome.rule, outcome.reason = "parameter-modified", kept.damage_since(harmed)
            if len(kept.patched) > patched:
                outcome.rule, outcome.reason = "global-state", kept.patches_since(patched)
        if outcome.right and outcome.thorough:
            self._well_judged.update(plan.bold)
        if keep and outcome.right and applied:
            outcome.applied = applied[0]
            outcome.quiet = applied[1] if len(applied) > 1 else None
        else:
            _close_all(applied)
        outcome.seconds = time.perf_counter() - started
        self.log.append(outcome)
        return outcome

    def _run(self, outcome: Outcome, holder: list[Applied], against: Applied | None, timed: bool) -> None:
        observation, plan = self.observation, outcome.plan
        # What is bold and passes a first look may fail the commit: better here, before more is built upon it.
        outcome.thorough = outcome.final or not self._well_judged.issuperset(plan.bold)
        draws = self.judgement.calls.draws(touches_mask=plan.touches_mask, thorough=outcome.thorough)
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
        outcome.setup_seconds = sum(each.setup_seconds for each in holder)
        outcome.applications = max(len(holder), 1)
        outcome.figures = dict(verdict.figures)
        if not verdict.passed and not self.metric.overrules(verdict.rule):
            outcome.rule, outcome.reason = verdict.rule, verdict.detail
            return
        self.metric.judge(outcome, applied)
        if not outcome.right or not timed:
            return
        outcome.timing = self.time(applied, against)
        if observation.objective == "memory":
            self._judge_memory(outcome, applied)
        elif not outcome.timing.faster:
            outcome.rule = "slower"
            outcome.reason = outcome.timing.doubt

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
            calls += [call.clone() for call in self._of_other_sizes]
        if plan.touches_mask:
            calls.append(baseline.draw(padding=True))
        return calls

    @functools.cached_property
    def _of_other_sizes(self) -> list[Call]:
        """A call of sizes that eager takes, none of them one where its dimension reaches further, and one of
        batch size one where the batch is dynamic and no example has that size."""
        spec = self.observation.spec
        found: list[Call] = []
        reach = {name: min(2, dimension.high) for name, dimension in spec.dimensions.items()}
        drawn = [
            {name: max(size, reach[name]) for name, size in sizes.items()}
            for sizes in spec.sizes(self.baseline.generator, 4)
        ]
        fitting = [s for s in spec.sizes_in_proportion() if all(s[name] >= reach[name] for name in s)]

        def known(sizes: dict[str, int]) -> int:
            return sum(size in spec.dimensions[name].observed for name, size in sizes.items())

        taken: dict[str, int] = {}
        for sizes in sorted(drawn + fitting, key=known):
            if (call := self._taken(sizes)) is not None:
                taken = sizes
                found.append(call)
                break
        batch = {leaf.dims[0] for leaf in spec.leaves if 0 in leaf.dims}
        wanted = {n for n in batch if spec.dimensions[n].low <= 1 and 1 not in spec.dimensions[n].observed}
        single = dict.fromkeys(wanted, 1)
        for sizes in ({**taken, **single}, single) if single else ():
            if (call := self._taken(sizes)) is not None:
                found.append(call)
                break
        return found

    def _taken(self, sizes: dict[str, int]) -> Call | None:
        """A call of ``sizes``, and of an example's where they name none; None where eager refuses it."""
        call = self.baseline.draw(sizes=sizes)
        return call if self.baseline.runs(call) else None

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
                baseline.kinds(),
                seconds=min(span, self.budget.left()),
                patience=patience,
                warmup=2,
                # One that is stopped while it is timed has no result at all.
                deadline=now + _SHARE_TIMED * max(self._ends - now, 0.0),
                load=self.load,
                settle=spans.settling(observation.device_type),
            )

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


def _close_all(applied: list[Applied]) -> None:
    for item in applied:
        item.close()
    applied.clear()
    gc.collect()
