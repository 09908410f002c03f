"""The probes of one kernel in one dtype: what each looks for is what kernels get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from kpt.judge import outputs, tree
from kpt.judge.calls import Call
from kpt.judge.kernel_calls import attempted, backward, cloned, modified, versions_of
from kpt.judge.kernel_inputs import MakeInputs, is_float, is_weight, shapes, tensor_named, tensors_of, widened
from kpt.judge.layouts import with_layout
from kpt.judge.poison import poisoned, poisoned_everywhere, poisoned_memory
from kpt.judge.referee import judge, judge_gradients
from kpt.judge.verdict import Verdict, passed, rejected
from kpt.specs import Level


class _Dropped(Exception):
    """The reference itself cannot run these inputs."""


class Trial:
    """The probes of one kernel in one dtype. Each returns a verdict, or None if its inputs were dropped."""

    def __init__(
        self,
        run: Callable[..., Any],
        reference: Callable[..., Any],
        make_inputs: MakeInputs,
        level: Level,
        compute_dtype: torch.dtype | None,
        fixed: frozenset[str],
        dtype: torch.dtype | None,
        seed: int,
        few: int | None,
    ) -> None:
        self.few = few
        self.run, self.reference, self.make_inputs = run, reference, make_inputs
        self.level, self.compute_dtype, self.fixed, self.dtype = level, compute_dtype, fixed, dtype
        self.generator = torch.Generator().manual_seed(seed)

    # -- probes ---------------------------------------------------------------------------------

    def plain(self) -> Verdict:
        inputs = self._inputs()
        try:
            verdict = self._judged(inputs, "value")
        except _Dropped as dropped:
            raise ValueError(
                f"the reference cannot run the arguments {', '.join(inputs)}: {dropped.__cause__}"
            ) from dropped
        if verdict.rule in ("value", "nan"):  # memory that was never written is NaN or anything
            unwritten = self.unwritten()
            return unwritten if not unwritten.passed else verdict
        return verdict

    def unwritten(self) -> Verdict:
        """Fill uninitialised memory with NaN, first from Python code's allocations, then torch's own."""
        inputs = self._inputs()
        with torch.no_grad():
            like = list(outputs.tensors(self._reference(inputs)).values())
            cleared = self._attempt(inputs, like, fill=0.0)
            filled = self._attempt(inputs, like, fill=math.nan)
            with poisoned_everywhere():
                everywhere = self._attempt(inputs, like, fill=None)
        if cleared is None:
            return passed()  # it does not run under a dispatch mode; ordinary runs are judged
        for output in (filled, everywhere):
            if output is None or tree.structure(output) != tree.structure(cleared):
                continue
            for name, tensor in outputs.tensors(output).items():
                other = outputs.tensors(cleared)[name]
                if tensor.shape != other.shape or not tensor.is_floating_point():
                    continue
                holes = torch.isnan(tensor) & ~torch.isnan(other)
                if bool(holes.any()):
                    return rejected("unwritten", f"{int(holes.sum())} elements of {name} were never written")
        return passed()

    def replay(self) -> Verdict | None:
        """Two calls in a row, then one with the first call's tensors refilled in place."""
        first, second, third = self._inputs(), self._inputs(), self._inputs()
        second = {**second, **{name: first[name] for name in self.fixed if name in first}}
        with torch.no_grad():
            kept = self.run(**first)
            copy = tree.rebuild(kept, cloned)
            again = self.run(**second)
        changed = outputs.identical(kept, copy)
        if changed is not None:
            return rejected("replay", f"the next call overwrote {changed}")
        verdict = self._judged(second, "value")
        if not verdict.passed:
            return self._replayed(verdict, again, copy, "another call")
        if any(
            tensor.shape != tensor_named(third, name).shape or 0 in tensor.stride()
            for name, tensor in tensors_of(first).items()
        ):
            return verdict  # an expanded tensor cannot be refilled
        with torch.no_grad():
            for name, tensor in tensors_of(first).items():
                if name not in self.fixed:
                    tensor.copy_(tensor_named(third, name))
            refilled = self.run(**first)
        verdict = self._judged(first, "value")
        return self._replayed(verdict, refilled, copy, "the same tensors with new values")

    def _replayed(self, verdict: Verdict, output: Any, earlier: Any, what: str) -> Verdict:
        """A wrong output is a replay if it is an earlier call's."""
        if verdict.passed or outputs.identical(output, earlier) is not None:
            return verdict
        return rejected("replay", f"{what} gave an earlier call's outputs", verdict.figures)

    def new_weights(self, names: tuple[str, ...]) -> Verdict:
        """Two calls with the same tensors, of which the weights change meanwhile, as an optimizer does it."""
        inputs = self._inputs()
        inputs.update({name: inputs[name].clone() for name in names if name in inputs})
        with torch.no_grad():
            self.run(**inputs)
            for name in names:
                if name in inputs:
                    inputs[name].mul_(-0.5)
        verdict = self._judged(inputs, "value")
        if verdict.passed or verdict.rule == "input-modified":
            return verdict
        return rejected("replay", f"it does not follow new weights: {verdict.detail}", verdict.figures)

    def scaled(self, factor: float) -> Verdict | None:
        inputs = {
            name: value * factor if is_float(value) and not is_weight(name) else value
            for name, value in self._inputs(self.few).items()
        }
        return self._judged_or_dropped(inputs, "value", f"inputs scaled by {factor:g}")

    def overflowing(self, factor: float) -> Verdict | None:
        """On large inputs only what is finite is compared: values may differ where sums cancel or saturate.

        Results beyond half of the dtype's range are left out, since those round to infinity here or there; so
        are those that are not finite where the reference computes in the dtype that the kernel computes in.
        """
        inputs = {
            name: value * factor if is_float(value) and not is_weight(name) else value
            for name, value in self._inputs(self.few).items()
        }
        given = Call((), inputs).clone().kwargs
        with torch.no_grad():
            try:
                eager = outputs.tensors(self._reference(given))
                wide = outputs.tensors(self._reference(given, torch.float64))
            except _Dropped:
                return None
            narrow = outputs.tensors(self._cast(given))
            output, failure = attempted(partial(self.run, **inputs))
        if failure is not None:
            return rejected("error", f"it raises {failure}").named("error", f"inputs scaled by {factor:g}")
        for name, tensor in outputs.tensors(output).items():
            like = eager.get(name)
            if like is None or tensor.shape != like.shape or not like.is_floating_point():
                continue
            limit = 0.5 * torch.finfo(like.dtype).max
            safe = torch.isfinite(like) & (wide[name].abs() < limit)
            if name in narrow:
                safe &= narrow[name].abs() < 0.5 * torch.finfo(narrow[name].dtype).max
            lost = int((safe & ~torch.isfinite(tensor)).sum())
            if lost:
                reason = f"{lost} elements of {name} are not finite on inputs scaled by {factor:g}"
                return rejected("nan", f"{reason}, where the reference is")
        return passed()

    def sized(self, rows: int) -> Verdict | None:
        inputs = self._inputs(rows)
        return self._judged_or_dropped(inputs, "size", f"with {shapes(inputs)}")

    def strided(self, layout: str) -> Verdict | None:
        """All floating-point arguments in ``layout``, then each alone: a guard may look at one of them."""
        for inputs in self._with_layout(self._inputs(self.few), layout):
            verdict = self._judged_or_dropped(inputs, "stride", f"on {layout} inputs")
            if verdict is None or not verdict.passed:
                return verdict
        return passed()

    def repeated(self) -> Verdict:
        inputs = self._inputs()
        with torch.no_grad():
            first, second = self.run(**inputs), self.run(**inputs)
        changed = outputs.identical(first, second)
        if changed is None:
            return passed()
        return rejected("nondeterministic", f"{changed} differs between two runs of the same inputs")

    def gradients(self, rows: int | None = None, layout: str | None = None) -> Verdict | None:
        inputs = self._inputs(rows if layout is None else self.few)
        if layout is not None:
            inputs = next(iter(self._with_layout(inputs, layout)))
        where = f"on {layout} inputs" if layout else f"with {shapes(inputs)}" if rows else ""
        return self._gradients(inputs, where)

    def strided_gradients(self, layout: str) -> Verdict | None:
        """The upstream gradient of a sum over rows is expanded, that of a transposed use transposed."""
        inputs = self._inputs(self.few)
        return self._gradients(inputs, f"with a {layout} upstream gradient", upstream_layout=layout)

    def partial_gradients(self) -> Verdict | None:
        """Only the first activation, then only the weights, require gradients."""
        inputs = self._inputs()
        names = self._differentiable(inputs)
        for wanted in ([n for n in names if not is_weight(n)][:1], [n for n in names if is_weight(n)]):
            if wanted and wanted != names:
                verdict = self._gradients(self._inputs(), f"of {', '.join(wanted)} alone", names=wanted)
                if verdict is not None and not verdict.passed:
                    return verdict
        return passed()

    # -- parts ----------------------------------------------------------------------------------

    def _inputs(self, rows: int | None = None) -> dict[str, Any]:
        drawn = dict(self.make_inputs(self.generator, rows))
        if self.dtype is None:
            return drawn
        return {
            name: value.to(self.dtype) if is_float(value) and name not in self.fixed else value
            for name, value in drawn.items()
        }

    def _with_layout(self, inputs: dict[str, Any], layout: str) -> list[dict[str, Any]]:
        names = [name for name, value in inputs.items() if is_float(value) and name not in self.fixed]
        together = {
            name: with_layout(value, layout) if name in names else value for name, value in inputs.items()
        }
        alone = [{**inputs, name: together[name]} for name in names] if 1 < len(names) <= 4 else []
        return [together, *alone]

    def _reference(self, inputs: Mapping[str, Any], dtype: torch.dtype | None = None) -> Any:
        """The reference's outputs, its floating-point arguments cast to ``dtype``.

        Raises:
            _Dropped: it does not run these arguments.
        """
        cast = {
            name: value.to(dtype) if dtype is not None and is_float(value) else value
            for name, value in inputs.items()
        }
        try:
            return self.reference(**cast)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            raise _Dropped from error

    def _judged_or_dropped(self, inputs: dict[str, Any], rule: str, where: str) -> Verdict | None:
        try:
            verdict = self._judged(inputs, rule)
        except _Dropped:
            return None
        return verdict.named(verdict.rule, where)

    def _judged(self, inputs: dict[str, Any], rule: str) -> Verdict:
        """Judge one call; what is wrong is rejected under ``rule``, except for modified inputs."""
        with torch.no_grad():
            mine = Call((), inputs)
            given = mine.clone()
            copy = mine.clone()
            eager = self._reference(given.kwargs)
            wide = self._reference(given.kwargs, torch.float64)
            cast = self._cast(given.kwargs)
            versions = versions_of(inputs)
            poisoned_memory(outputs.tensors(eager).values())
            candidate, failure = attempted(partial(self.run, **inputs))
            if failure is not None:
                return rejected("error" if rule == "value" else rule, f"it raises {failure}")
            verdict = modified(copy, mine, versions)
            if verdict is not None:
                return verdict
            verdict = judge(
                candidate,
                wide,
                eager,
                level=self.level,
                cast_eager=cast,
                compute_dtype=self.compute_dtype,
                inputs=mine,
                eager_inputs=given,
            )
        return verdict if verdict.passed or rule == "value" else verdict.named(rule)

    def _cast(self, inputs: Mapping[str, Any]) -> Any:
        if self.compute_dtype is None or not self.compute_dtype.is_floating_point:
            return None
        try:
            return self._reference(inputs, self.compute_dtype)
        except _Dropped:
            return None

    def _attempt(self, inputs: dict[str, Any], like: list[torch.Tensor], fill: float | None) -> Any:
        """The kernel's outputs on a copy of ``inputs``, or None if it does not run under poison."""
        copy = Call((), inputs).clone().kwargs
        copy.update({name: inputs[name] for name in self.fixed if name in inputs})
        if fill is None:
            return attempted(partial(self.run, **copy))[0]
        with poisoned(like, fill):  # a failure under poison is no fault: the other probes judge without
            return attempted(partial(self.run, **copy))[0]

    def _differentiable(self, inputs: Mapping[str, Any]) -> list[str]:
        return [name for name, value in inputs.items() if is_float(value) and name not in self.fixed]

    def _upstream(self, like: torch.Tensor, layout: str | None) -> torch.Tensor:
        drawn = torch.randn(like.shape, generator=self.generator).to(like.device)
        return drawn if layout is None else with_layout(drawn, layout)

    def _gradients(
        self,
        inputs: dict[str, Any],
        where: str,
        names: list[str] | None = None,
        upstream_layout: str | None = None,
    ) -> Verdict | None:
        wanted = self._differentiable(inputs) if names is None else names
        mine = Call((), inputs)
        copy, given = mine.clone(), mine.clone()
        try:
            with torch.no_grad():
                template = self._reference(given.kwargs)
            upstream = [self._upstream(t, upstream_layout) for t in outputs.tensors(template).values()]
            eager, _ = backward(self._reference, given.kwargs, wanted, upstream)
            wide, _ = backward(self._reference, widened(given.kwargs, torch.float64), wanted, upstream)
        except _Dropped:
            return None
        cast = None
        if self.compute_dtype is not None and self.compute_dtype.is_floating_point:
            try:
                lowered = widened(given.kwargs, self.compute_dtype)
                cast, _ = backward(self._reference, lowered, wanted, upstream)
            except (_Dropped, RuntimeError):
                cast = None

        def through_kernel(arguments: Mapping[str, Any]) -> Any:
            return self.run(**arguments)

        with poisoned(outputs.tensors(template).values()):
            result, failure = attempted(partial(backward, through_kernel, inputs, wanted, upstream))
        if failure is not None:
            return rejected("gradient", f"backward raises {failure}").named("gradient", where)
        found, kept = result
        if not kept or outputs.identical(copy.kwargs, mine.kwargs) is not None:
            return rejected("input-modified", "backward modified an input")
        verdict = judge_gradients(
            found, wide, eager, level=self.level, cast_eager=cast, compute_dtype=self.compute_dtype
        )
        return verdict.named("gradient", where)
