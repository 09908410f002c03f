"""Stage 6: install the best plan on the user's model, prove it once more there, or take it back."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from kpt import compiling
from kpt.error_text import summary
from kpt.judge import clock, spans
from kpt.judge.tolerances import keep_worst
from kpt.judge.verdict import Verdict
from kpt.transaction import dispatch
from kpt.transaction.budget import BudgetSpent
from kpt.transaction.installed import plan_for
from kpt.transaction.memory import out_of_memory

if TYPE_CHECKING:
    import torch

    from kpt.judge.timing import Timing
    from kpt.transaction.applied import Applied
    from kpt.transaction.outcome import Outcome
    from kpt.transaction.trial import Trials

#: Share of what is left of the budget that the last timing takes at most.
_SHARE_TIMED = 0.8


class Committed:
    """A plan installed on a model. `take_back` gives the original forward again and frees everything."""

    def __init__(self, model: torch.nn.Module, outcome: Outcome, trials: Trials) -> None:
        applied = outcome.applied
        if applied is None:
            raise ValueError("only a plan whose workspace is alive can be committed")
        self.applied = applied
        self.outcome = outcome
        self.plan = plan_for(model, applied, trials.observation)
        self.watch = self.plan.watch
        self.plan.committed = self
        self._uninstall: Callable[[], None] | None = dispatch.install(model, self.plan)
        self._finalizer = weakref.finalize(model, applied.close, in_run=False)
        self._finalizer.atexit = False

    def time(self, model: torch.nn.Module, trials: Trials) -> Timing:
        """The untouched model against the installed one, end to end, our own overhead included."""
        runner, plain = trials.baseline.runner, trials.baseline.plain
        latency = max(trials.observation.baseline_seconds, 1e-5)
        seconds = min(max(1.5, 24 * latency), 0.08 * trials.budget.seconds)
        left, now = trials.budget.left(), time.perf_counter()
        with runner.buffers_kept():
            return clock.paired(
                lambda *args, **kwargs: runner.run(plain.forward, args, kwargs),
                lambda *args, **kwargs: runner.run(model.forward, args, kwargs),
                trials.baseline.kinds(),
                seconds=min(seconds, max(0.5, left)),
                patience=min(2.0 * seconds, max(0.0, 0.5 * left - seconds)),
                warmup=2,
                # One that is stopped while it is timed is lost, whatever was seen of it.
                deadline=now + _SHARE_TIMED * left,
                load=trials.load,
                settle=spans.settling(trials.observation.device_type),
            )

    def take_back(self, *, in_run: bool = False) -> list[str]:
        """Remove the patch, the watch and the workspace; return what undoing the plan complained of.

        ``in_run`` says that a budget runs, within which no undo is waited for any longer than in a trial.

        Raises:
            RuntimeError: the forward was wrapped by somebody else and cannot be unwound; nothing was
                removed then.
        """
        if self._uninstall is not None:
            self._uninstall()
            self._uninstall = None
        self.watch.close()
        known = len(self.applied.undo_errors)
        self._finalizer.detach()
        self.applied.close(in_run=in_run)
        return self.applied.undo_errors[known:]


def _judged_again(outcome: Outcome, applied: Applied, trials: Trials) -> tuple[str, str]:
    """The rule of the last judgement and its detail; the worst figures of both are the outcome's."""
    with trials.kept.untouched():
        verdicts = [_judge_values(outcome, trials)]
        if trials.observation.stochastic and verdicts[0].passed:
            verdicts.append(_verdict(lambda: trials.judgement.judge_dropout(applied, fresh=True)))
    for verdict in verdicts:
        keep_worst(outcome.figures, verdict.figures)
    if trials.metric.overrules(verdicts[-1].rule):
        return "ok", ""  # the metric was measured when the plan was tried
    return verdicts[-1].rule, verdicts[-1].detail


def _judge_values(outcome: Outcome, trials: Trials) -> Verdict:
    """Values (and gradients) on fresh inputs; without dropout where that decides the outputs."""
    judged = outcome.quiet if trials.observation.stochastic else outcome.applied
    if judged is None:
        raise ValueError("the application that values are judged on was closed before the commit")
    draws = trials.judgement.calls.draws(touches_mask=judged.plan.touches_mask, thorough=True)
    return _verdict(lambda: trials.judgement.judge(judged, draws))


def _verdict(judge: Callable[[], Verdict]) -> Verdict:
    """What ``judge`` finds; a plan that raises, on sizes that no trial drew say, is refused as if wrong."""
    try:
        return judge()
    except (compiling.DeadlinePassed, BudgetSpent):
        raise
    except Exception as error:  # noqa: BLE001 - a plan may fail in any way
        rule = "memory" if out_of_memory(error) else "failed"
        return Verdict(False, rule, summary(error), {})


def commit(
    model: torch.nn.Module, outcome: Outcome, trials: Trials, *, timed: bool = True
) -> tuple[Committed | None, tuple[str, str], Timing | None]:
    """Install ``outcome``'s plan and compare it end to end with the untouched model.

    Its values are judged once more before that, on fresh inputs and more of them: who is the fastest of many
    may be right by chance. Where a single plan was tried, and that as thoroughly, they are not.

    Returns the commitment, or None with the rule and the reason why the original came back, and the last
    timing.
    """
    applied = outcome.applied
    assert applied is not None
    harmed = len(trials.kept.damage)
    rule, detail = ("ok", "") if outcome.final else _judged_again(outcome, applied, trials)
    outcome.hush()
    if len(trials.kept.damage) > harmed:
        rule, detail = "parameter-modified", trials.kept.damage_since(harmed)
    if rule != "ok":
        outcome.close()
        reason = f"the final judgement on fresh inputs rejected the plan ({rule}: {detail})"
        return None, (rule, reason), None
    committed = Committed(model, outcome, trials)
    try:
        return _proven(committed, model, trials, harmed) if timed else (committed, ("ok", ""), None)
    except BaseException:
        committed.take_back(in_run=True)
        raise


def _proven(
    committed: Committed, model: torch.nn.Module, trials: Trials, harmed: int
) -> tuple[Committed | None, tuple[str, str], Timing | None]:
    """Time what is installed; take it back where it changed the model, serves nothing, or is not faster."""
    with trials.kept.state_kept():
        timing = committed.time(model, trials)
    if len(trials.kept.damage) > harmed:
        _free(committed)
        return None, ("parameter-modified", trials.kept.damage_since(harmed)), timing
    used, fallbacks = committed.plan.optimized_calls, committed.plan.fallbacks.to_dict()
    committed.plan.reset_counters()
    faster = timing.faster or (trials.observation.objective == "memory" and timing.high >= 1.0)
    if used == 0 or not faster:
        _free(committed)
        reason = (
            "the guard let no call reach the plan: " + ", ".join(fallbacks)
            if used == 0
            else f"end to end {timing.doubt}"
        )
        return None, ("slower" if used else "no-effect", reason), timing
    return committed, ("ok", ""), timing


def _free(committed: Committed) -> None:
    """Take it back, with the memory that it holds: the search may go on."""
    committed.take_back(in_run=True)
    committed.outcome.applied = None
