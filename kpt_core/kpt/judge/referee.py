"""The referee: whether a candidate's outputs and gradients may replace the eager model's.

Three results of the same call are compared: the *candidate*'s, the *eager* model's, and a *reference*
in fp64 (fp32 where fp64 is out of reach). Eager is often the less exact of the last two, so a
candidate is measured against the reference and allowed what eager itself needed (`kpt.judge.tolerances`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from kpt.judge import distances, outputs
from kpt.judge.aliasing import new_aliases
from kpt.judge.handover import judge_structure
from kpt.judge.tolerances import Terms, judge_leaf, keep_worst
from kpt.judge.verdict import Verdict, passed, rejected
from kpt.specs import LEVELS, Level

#: Times as much as eager's that results may vary over seeds with dropout, but for chance,
_DROPOUT = 1.25
#: which is ruled out at this many of its standard deviations.
_SURE = 4.0


def judge(
    candidate: Any,
    reference: Any,
    eager: Any,
    *,
    level: Level,
    cast_eager: Any = None,
    compute_dtype: torch.dtype | str | None = None,
    mask: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
    logits: frozenset[str] | tuple[str, ...] = (),
    rule: str = "value",
    inputs: Any = None,
    eager_inputs: Any = None,
) -> Verdict:
    """Judge the outputs of one call.

    Args:
        candidate, reference, eager: outputs of the same structure. ``reference`` is wider; its dtypes
            are not compared.
        level: the strictest rule that applies: "exact", "production" or "aggressive".
        cast_eager: the outputs of the plain eager model cast to ``compute_dtype``, None if it cannot run so.
        compute_dtype: the dtype (or its name) that arithmetic drops to; None for a plan that keeps dtypes,
            which is judged by the exact rule at every level.
        mask: flags [batch, sequence] of the positions that count, or several by input name, as
            `InputSpec.padding_masks` gives them; other positions are judged by shape only.
        logits: names of further leaves that hold unnormalised scores.
        rule: the name under which wrong values are rejected ("size", "mask", where such a call reveals it).
        inputs, eager_inputs: the call that each was given, to find outputs that alias an input.
    """
    _check_level(level)
    dtype = as_dtype(compute_dtype)
    wrong = judge_structure(candidate, eager)
    if wrong is not None:
        return wrong
    alias = new_aliases(candidate, eager, inputs, eager_inputs)
    if alias is not None:
        return rejected("structure", alias)
    masks = {"": mask} if isinstance(mask, torch.Tensor) else dict(mask or {})
    terms = Terms(level, dtype, masks, frozenset(logits), rule=rule)
    wide, cast = outputs.tensors(reference), outputs.tensors(cast_eager)
    figures: dict[str, float] = {}
    near: Verdict | None = None
    most = 0.0
    for mine, own in zip(outputs.leaves(candidate), outputs.leaves(eager), strict=True):
        if not mine.is_tensor:
            continue
        expected = wide.get(mine.name)
        if expected is None or expected.shape != own.value.shape:
            return rejected(
                "structure", f"the reference has no {mine.name} of shape {tuple(own.value.shape)}"
            )
        verdict = judge_leaf(mine.name, mine.value, expected, own.value, cast.get(mine.name), terms)
        keep_worst(figures, verdict.figures)
        if verdict.passed:
            most = max(most, verdict.excess)
        elif verdict.rule != rule:  # whatever else is off, and whoever decides of that
            return replace(verdict, figures=figures)
        elif near is None or verdict.excess > near.excess:
            near = verdict  # how far off the call is, the worst of its outputs says
    return passed(figures=figures, excess=most) if near is None else replace(near, figures=figures)


def judge_gradients(
    candidate: Mapping[str, torch.Tensor | None],
    reference: Mapping[str, torch.Tensor | None],
    eager: Mapping[str, torch.Tensor | None],
    *,
    level: Level,
    cast_eager: Mapping[str, torch.Tensor | None] | None = None,
    compute_dtype: torch.dtype | str | None = None,
) -> Verdict:
    """Judge gradients by parameter (or input) name; a parameter without one must have none in each.

    Gradients that vanish analytically (a key projection's bias under softmax) are all rounding noise:
    the tolerance also grows with 1 % of the root mean square over all gradients. An acceptance says nothing
    of how near they are to what is allowed: some of them are right beyond it.
    """
    _check_level(level)
    dtype = as_dtype(compute_dtype)
    if set(candidate) != set(eager):
        names = sorted(set(candidate) ^ set(eager))
        return rejected("gradient", f"gradients differ in their names: {', '.join(names[:5])}")
    terms = Terms(level, dtype, floor=_floor(reference), rule="gradient")
    figures: dict[str, float] = {}
    for name, own in eager.items():
        mine, expected = candidate[name], reference.get(name)
        if (mine is None) != (own is None):
            has = "no gradient" if mine is None else "a gradient"
            return rejected("gradient", f"{name} has {has}, unlike in eager mode", figures)
        if mine is None or own is None:
            continue
        if mine.shape != own.shape or mine.dtype != own.dtype:
            return rejected(
                "gradient",
                f"the gradient of {name} is {mine.dtype} {tuple(mine.shape)}, "
                f"eager's {own.dtype} {tuple(own.shape)}",
                figures,
            )
        if expected is None:
            return rejected("gradient", f"the reference has no gradient of {name}", figures)
        cast = cast_eager.get(name) if cast_eager else None
        verdict = judge_leaf(name, mine, expected, own, cast, terms)
        keep_worst(figures, verdict.figures)
        if not verdict.passed:
            return replace(verdict, rule="gradient", figures=figures)
    return passed(figures=figures)


def judge_buffers(
    candidate: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
    eager: Mapping[str, torch.Tensor],
    *,
    level: Level,
    cast_eager: Mapping[str, torch.Tensor] | None = None,
    compute_dtype: torch.dtype | str | None = None,
) -> Verdict:
    """Judge the buffers that a call moves, by name, all of which each has.

    Numbers that miss the tolerance, which is that of gradients, are rejected under ``value``. A count that
    differs, or a buffer of another form, is no matter of tolerances: that is ``global-state``.
    """
    _check_level(level)
    terms = Terms(level, as_dtype(compute_dtype), floor=_floor(reference), rule="gradient")
    figures: dict[str, float] = {}
    for name, own in eager.items():
        mine = candidate[name]
        if mine.shape != own.shape or mine.dtype != own.dtype:
            forms = f"{mine.dtype} {tuple(mine.shape)}, eager's {own.dtype} {tuple(own.shape)}"
            return rejected("global-state", f"the buffer {name} is {forms}", figures)
        verdict = judge_leaf(name, mine, reference[name], own, (cast_eager or {}).get(name), terms)
        keep_worst(figures, verdict.figures)
        if not verdict.passed:
            numbers = own.is_floating_point() or own.is_complex()
            rule = verdict.rule if verdict.rule != terms.rule else "value" if numbers else "global-state"
            return rejected(rule, f"buffers that the forward moves: {verdict.detail}", figures)
    return passed(figures=figures)


def _floor(reference: Mapping[str, torch.Tensor | None]) -> float:
    """A hundredth of the root mean square over all of ``reference``."""
    total, elements = 0.0, 0
    for expected in reference.values():
        if expected is not None and (expected.is_floating_point() or expected.is_complex()):
            measured = distances.distance(expected, expected)
            total += measured.scale**2 * measured.elements
            elements += measured.elements
    return 0.01 * math.sqrt(total / max(elements, 1))


def judge_dropout(candidate: Spread, eager: Spread) -> Verdict:
    """Judge the rate of dropout by how much the results of one call vary from seed to seed.

    Standard deviations over seeds may differ by a quarter, and by four times what those of as many runs of as
    many independent elements differ by chance: a loss, which is one number, is no more than looked at. Where
    eager's results do not vary, the candidate's must not.
    """
    figures: dict[str, float] = {}
    for name, mine in candidate.deviations.items():
        own = eager.deviations.get(name, 0.0)
        if own == 0.0 and mine == 0.0:
            continue
        ratio = mine / own if own else math.inf
        keep_worst(figures, {"dropout_ratio": max(ratio, 1.0 / ratio if ratio else math.inf)})
        freedom = max(min(candidate.runs, eager.runs) - 1, 1) * max(candidate.elements[name], 1)
        chance = _SURE / math.sqrt(freedom)
        if not ratio or abs(math.log(ratio)) > math.log(_DROPOUT) + chance:
            return rejected(
                "dropout", f"{name} varies {ratio:.3g} times as much over seeds as in eager mode", figures
            )
    return passed(figures=figures)


@dataclass(frozen=True)
class Spread:
    """How much each result varied over ``runs``: the root mean square over its elements of their standard
    deviation, and how many ``elements`` it has, both by name."""

    deviations: dict[str, float]
    elements: dict[str, int]
    runs: int


def spread(runs: Iterable[Mapping[str, torch.Tensor]]) -> Spread:
    """The spread of ``runs``, each of which gives tensors by name; all but floating-point ones are left out.

    They are read one by one, and none is kept: means and squares are updated (Welford, 1962). What is not
    finite counts as 0.
    """
    means: dict[str, torch.Tensor] = {}
    squares: dict[str, torch.Tensor] = {}
    count = 0
    for run in runs:
        count += 1
        for name, value in run.items():
            if not value.is_floating_point():
                continue
            wide = value.detach().to(torch.float64).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            mean = means.setdefault(name, torch.zeros_like(wide))
            change = wide - mean
            mean += change / count
            squares.setdefault(name, torch.zeros_like(wide)).addcmul_(change, wide - mean)
    variances = {name: sums.sum() / max(sums.numel() * (count - 1), 1) for name, sums in squares.items()}
    deviations = {name: float(variance.sqrt()) for name, variance in variances.items()}
    return Spread(deviations, {name: sums.numel() for name, sums in squares.items()}, count)


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype from itself or its name ("bfloat16", "torch.bfloat16", "tf32" for float32 matmuls in TF32)."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    name = dtype.removeprefix("torch.")
    found = getattr(torch, {"tf32": "float32"}.get(name, name), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(
            f"unknown compute dtype {dtype!r}; expected a name such as 'bfloat16', 'int8' or 'tf32'"
        )
    return found


def _check_level(level: str) -> None:
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}; the levels are {', '.join(LEVELS)}")
