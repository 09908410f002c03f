"""What the referee looks at when it judges an applied plan on fresh calls, and in which order."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from kpt import compiling
from kpt.error_text import summary
from kpt.judge import handover, outputs, pieces, referee, tree
from kpt.judge.calls import copied_leaf
from kpt.judge.poison import poisoned
from kpt.judge.state import untouched
from kpt.judge.tolerances import keep_worst
from kpt.judge.verdict import Verdict, passed, rejected
from kpt.transaction import other_calls
from kpt.transaction.counts import plain_name, same_step, spelled
from kpt.transaction.execution import seeded
from kpt.transaction.fresh_calls import Draw, FreshCalls
from kpt.transaction.memory import out_of_memory
from kpt.transaction.nearness import Others, as_before, worst

if TYPE_CHECKING:
    from collections.abc import Callable

    from kpt.judge.calls import Call
    from kpt.transaction.applied import Applied
    from kpt.transaction.baseline import Baseline
    from kpt.transaction.budget import Budget
    from kpt.transaction.observe import Observation

_STOPS = (KeyboardInterrupt, compiling.DeadlinePassed, MemoryError)
#: Seeds over which outputs vary with dropout.
_SEEDS = 8
#: Numbers of which fewer say little of a rate of dropout: those of a loss, or of a few classes.
_FEW = 1000
#: What gradients are called beside outputs, and how many of each parameter's are looked at, about.
_GRADIENTS, _SAMPLED = "the gradients together", 4096


class Judgement:
    """Judges applied plans of one observation against its baseline."""

    def __init__(
        self,
        observation: Observation,
        baseline: Baseline,
        budget: Budget,
        *,
        overruled: Callable[[str], bool] = lambda rule: False,
    ) -> None:
        self.observation = observation
        #: Whether somebody else decides what a rule that compares values does.
        self.overruled = overruled
        self.baseline = baseline
        self.budget = budget
        self.calls = FreshCalls(observation, baseline)
        self.others = Others(self.calls, budget, overruled, self._one)
        #: Numbers outside of tensors that moved when the plan that is judged now was called.
        self._moved_by_plan: set[str] = set()
        #: A call, and how much the untouched model's results vary over seeds in it.
        self._varied: tuple[Call, referee.Spread] | None = None

    def judge(self, applied: Applied, draws: list[Draw]) -> Verdict:
        """The first rejection over ``draws``, or an acceptance with the worst figures.

        One that is ``overruled`` is given only where nothing else speaks against the plan.
        """
        figures: dict[str, float] = {}
        kept: list[tuple[Draw, Any, Any]] = []
        missed: list[Verdict | None] = []
        self.others.restart()
        self._moved_by_plan.clear()
        if draws and self._leaves_unwritten(applied, draws[0]):
            detail = "memory that was never written shows up in the outputs or gradients"
            return Verdict(False, "unwritten", f"{draws[0].label}: {detail}", figures)
        for draw in draws:
            verdict, output = self._one(applied, draw)
            keep_worst(figures, verdict.figures)
            if self.others.wanted(applied, verdict):
                draw, verdict, output = self.others.judged(applied, draw, (verdict, output), figures)
            if not verdict.passed:
                detail = f"{draw.label}: {verdict.detail}"
                verdict = Verdict(False, verdict.rule, detail, figures, verdict.excess)
                if not self.overruled(verdict.rule):
                    return verdict
            missed.append(None if verdict.passed else verdict)
            kept.append((draw, output, _copied(output)))
        for draw, output, copied in kept:
            changed = outputs.identical(copied, output)
            if changed is not None:
                detail = f"output {changed} of one call was overwritten by a later call ({draw.label})"
                return Verdict(False, "replay", detail, figures)
            held = handover.judge_held(output, draw.expected.eager.output)
            if not held.passed:
                return Verdict(False, held.rule, f"{draw.label}: {held.detail}", figures)
        judged = [draw for draw, *_ in kept]
        counted = self._counts_otherwise(applied, judged[0]) if judged else None
        if counted is not None:
            return Verdict(False, "global-state", counted, figures)
        if len(judged) > 1:
            verdict = self._refilled(applied, *judged[:2])
            if not (verdict.passed or self._excused(verdict, missed[1])):
                detail = f"the same memory or the same tensors with new values: {verdict.detail}"
                return Verdict(False, "replay", detail, figures)
        if judged:
            verdict = self._elsewhere(applied, judged[0])
            if not (verdict.passed or self._excused(verdict, missed[0])):
                where = "for inputs at odd addresses"
                where += "" if self.observation.training else ", in inference mode"
                return Verdict(False, verdict.rule, f"{where}: {verdict.detail}", figures)
        overruled = worst(missed)
        return Verdict(True, "ok", "", figures) if overruled is None else overruled

    def _excused(self, verdict: Verdict, missed: Verdict | None) -> bool:
        return self.overruled(verdict.rule) and as_before(verdict, missed)

    def _elsewhere(self, applied: Applied, draw: Draw) -> Verdict:
        """Judge the call of ``draw`` as others may make it, which the guard lets pass too: with tensors that
        begin one element into their memory and, in inference, in inference mode and made in it.

        What eager does not take there is not asked for.
        """
        expected, training = draw.expected, self.observation.training

        def called(forward: Any, given: Call) -> Any:
            with seeded(draw.seed), untouched():
                return self.baseline.runner.collect(forward, given, seed=draw.seed)

        with nullcontext() if training else torch.inference_mode():
            given = other_calls.at_odd_addresses(expected.call)
            try:
                eager = called(self.baseline.judged.forward, given)
            except _STOPS:
                raise
            except Exception:  # noqa: BLE001 - a forward that differentiates refuses inference mode, say
                return passed()
            there = replace(draw, expected=replace(expected, given=given, eager=eager))
            try:
                return self._one(applied, there, other_calls.at_odd_addresses(expected.call))[0]
            except _STOPS:
                raise
            except Exception as error:
                if out_of_memory(error):
                    raise
                return Verdict(False, "failed", summary(error))

    def _refilled(self, applied: Applied, first: Draw, second: Draw) -> Verdict:
        """Call with ``first``, with others in the memory of its tensors, and with these, written to.

        Whoever remembers results by the memory of tensors, or by their identity, answers with the old ones.
        A tensor that got the memory of one that is gone has the same address and the same version. Each call
        gets containers of its own, since the model may append to a list or exchange what it holds.
        """
        given = other_calls.in_its_memory(first.expected.call.clone())  # of the version that a new tensor has
        mine, new = given.leaves(), second.expected.call.leaves()
        both = [(old, other) for (_, old), (_, other) in zip(mine, new)]
        pairs = [pair for pair in both if isinstance(pair[0], torch.Tensor)]
        if [path for path, _ in mine] != [path for path, _ in new] or not all(map(other_calls.alike, both)):
            return passed()
        if other_calls.repeats(old for old, _ in pairs) != other_calls.repeats(other for _, other in pairs):
            return passed()  # one tensor given twice can't hold the values of two
        self._one(applied, first, given.map(lambda path, leaf: leaf))
        for old, other in pairs:
            old.data.copy_(other.detach())  # which counts no version
        verdict = self._one(applied, second, other_calls.in_its_memory(given))[0]
        if not verdict.passed:
            return verdict
        with torch.no_grad():
            for old, other in pairs:
                old.copy_(other)
        return self._one(applied, second, given.map(lambda path, leaf: leaf))[0]

    def _counts_otherwise(self, applied: Applied, draw: Draw) -> str | None:
        """A sentence naming a number outside of tensors that each call of the untouched model moves alike,
        or leaves alone, and one of the plan otherwise.

        Calls are made for it only where a number moved while the draws were made and judged.
        """
        if not self.calls.moved and not self._moved_by_plan:
            return None

        def moved(forward: Any) -> dict[str, int | float]:
            with seeded(draw.seed), untouched():
                given = draw.expected.call.clone()
                return self.calls.counts.moved(
                    lambda: self.baseline.runner.collect(forward, given, seed=draw.seed)
                )

        eager = [moved(self.baseline.judged.forward) for _ in range(2)]
        mine = [moved(applied.forward) for _ in range(2)]
        for name in sorted({*eager[0], *eager[1], *mine[0], *mine[1]}):
            steps, own = [m.get(name, 0) for m in eager], [m.get(name, 0) for m in mine]
            if not same_step(*steps) or (not any(steps) and name in self.calls.moved):
                continue  # some calls of the model's own move it otherwise
            for step in own:
                if not same_step(step, steps[0]):
                    theirs, what = spelled(steps[0]), plain_name(name)
                    return f"a call changes {what} by {spelled(step)}, the untouched model's by {theirs}"
        return None

    def _leaves_unwritten(self, applied: Applied, draw: Draw) -> bool:
        """Whether NaN in newly allocated memory comes out, and zeros there do not come out as NaN.

        Stale memory may hold the right answer of an earlier call, so that values alone do not tell.
        Compiled code allocates out of sight of a dispatch mode and is judged by its values.
        """
        if applied.compiled:
            return False
        like = list(outputs.tensors(draw.expected.eager.output).values())
        try:
            with poisoned(like):
                if self._one(applied, draw)[0].rule != "nan":
                    return False
            with poisoned(like, fill=0.0):
                return self._one(applied, draw)[0].rule != "nan"
        except _STOPS:
            raise
        except Exception:  # noqa: BLE001 - what cannot run under a dispatch mode is judged without
            return False

    def judge_dropout(self, applied: Applied, *, fresh: bool = False) -> Verdict:
        """Whether outputs vary from seed to seed as much as the untouched model's do.

        Of one call, the same for all plans, unless a ``fresh`` one is asked for. Where the outputs are few
        numbers, as a loss is, which say little of a rate, the gradients are looked at too.
        """
        if fresh or self._varied is None:
            call, plain = self.baseline.draw(), self.baseline.plain.forward
            eager = self._spread(plain, call, gradients=False)
            few = self.observation.training and max(eager.elements.values(), default=0) < _FEW
            self._varied = call, self._spread(plain, call, gradients=True) if few else eager
        call, eager = self._varied
        return referee.judge_dropout(
            self._spread(applied.forward, call, gradients=_GRADIENTS in eager.elements), eager
        )

    def _spread(self, forward: Any, call: Call, *, gradients: bool) -> referee.Spread:
        def results(seed: int) -> dict[str, torch.Tensor]:
            with seeded(seed):
                ran = self.baseline.runner.collect(forward, call.clone(), gradients=gradients)
            found = dict(outputs.tensors(ran.output))
            samples = [_sample(each) for each in ran.gradients.values() if each is not None]
            if samples:
                found[_GRADIENTS] = torch.cat([each.cpu().double() for each in samples])
            return found

        return referee.spread(map(results, range(_SEEDS)))

    def _one(self, applied: Applied, draw: Draw, given: Call | None = None) -> tuple[Verdict, Any]:
        """Judge one call, made with ``given`` where that is another copy of it."""
        expected, plan = draw.expected, applied.plan
        level, dtype = plan.level, plan.compute_dtype
        given = expected.call.clone() if given is None else given
        before = self.calls.counts.read()
        with seeded(draw.seed):
            with untouched() as changes:
                mine = self.baseline.runner.collect(applied.forward, given, seed=draw.seed)
        self._moved_by_plan.update(self.calls.counts.since(before))
        changed = [name for name in (*changes.names, *changes.stuck) if name not in expected.changes]
        if changed:
            return rejected("global-state", f"a call changes {', '.join(changed)}"), mine.output
        modified = handover.judge_inputs(expected.given, given)
        if not modified.passed:
            return modified, mine.output
        cast = (
            self.baseline.cast(expected, dtype, seed=draw.seed) if dtype and level != "aggressive" else None
        )
        verdict = referee.judge(
            mine.output,
            expected.reference.output,
            expected.eager.output,
            level=level,
            cast_eager=cast.output if cast else None,
            compute_dtype=dtype,
            mask=self.observation.spec.padding_masks(expected.call) if plan.touches_mask else None,
            rule=draw.rule,
            inputs=given,
            eager_inputs=expected.given,
        )
        final = verdict.excess == math.inf or level == "exact"
        if not verdict.passed and final and not self.overruled(verdict.rule):
            return verdict, mine.output
        outputs_verdict = verdict  # one that may be by chance excuses nothing of what follows
        figures = dict(verdict.figures)
        strides = handover.judge_strides(mine.output, expected.eager.output)
        if not strides.passed:
            return strides, mine.output
        lost = sorted(expected.eager.differentiable - mine.differentiable)
        if lost:
            detail = f"the output {lost[0]} has no gradient, unlike in eager mode"
            return Verdict(False, "gradient", detail, verdict.figures), mine.output
        more = sorted(mine.differentiable - expected.eager.differentiable)
        if more and not self.observation.training:
            detail = f"the output {more[0]} requires a gradient, unlike in eager mode"
            return Verdict(False, "gradient", detail, verdict.figures), mine.output
        kept = self.baseline.runner.buffers
        differing = {*mine.buffers} ^ {*expected.eager.buffers}
        either = {**mine.buffers, **expected.eager.buffers}
        lost = sorted(name for name in differing if not _by_rounding(either[name], kept[name]))
        if lost:
            detail = f"{lost[0]} is a buffer that {'the plan' if lost[0] in mine.buffers else 'eager mode'}"
            detail = f"{detail} moves, and the other does not"
            return rejected("global-state", detail, verdict.figures), mine.output
        terms: dict[str, Any] = {"level": level, "compute_dtype": dtype}
        if mine.gradients or expected.eager.gradients:
            verdict = referee.judge_gradients(
                mine.gradients,
                expected.reference.gradients,
                expected.eager.gradients,
                cast_eager=cast.gradients if cast else None,
                **terms,
            )
            keep_worst(figures, verdict.figures)
            if not verdict.passed:
                return Verdict(False, "gradient", verdict.detail, figures), None
        if either:
            resting = {name: kept[name] for name in either}  # where one of the three leaves it alone
            verdict = referee.judge_buffers(
                {**resting, **mine.buffers},
                {name: expected.reference.buffers.get(name, resting[name]) for name in either},
                {**resting, **expected.eager.buffers},
                cast_eager=cast.buffers if cast else None,
                **terms,
            )
            keep_worst(figures, verdict.figures)
            if not verdict.passed:
                return rejected(verdict.rule, verdict.detail, figures), mine.output
        return replace(outputs_verdict, figures=figures), mine.output


def _by_rounding(moved: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether a buffer moved by its last bits only: one at its fixed point may, or not."""
    if not moved.is_floating_point() or moved.layout is not torch.strided or moved.shape != before.shape:
        return False
    most = 8.0 * torch.finfo(moved.dtype).eps * before.abs().max() if before.numel() else 0.0
    return bool(((moved - before).abs() <= most).all())


def _copied(output: Any) -> Any:
    return tree.rebuild(
        output, lambda path, leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else copied_leaf(leaf)
    )


def _sample(gradient: torch.Tensor) -> torch.Tensor:
    """Some of its elements, from all over it."""
    flat = pieces.flat(gradient)
    flat = torch.view_as_real(flat).flatten() if flat.is_complex() else flat
    return flat[:: max(1, flat.numel() // _SAMPLED)]
