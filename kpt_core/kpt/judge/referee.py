"""The referee: whether a candidate's outputs and gradients may replace the eager model's.

Three results of the same call are compared: the *candidate*'s, the *eager* model's, and a *reference*
in fp64 (fp32 where fp64 is out of reach). Eager is often the less exact of the last two, so a
candidate is measured against the reference and allowed what eager itself needed.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kpt.judge import outputs, tree
from kpt.judge.aliasing import holders, new_aliases
from kpt.specs import LEVELS, Level

#: Every rule under which the referee rejects. Receipts and tests name them; they do not change.
RULES = (
    "value",
    "nan",
    "gradient",
    "stride",
    "shape",
    "size",
    "input-modified",
    "replay",
    "unwritten",
    "structure",
    "dtype",
    "nondeterministic",
    "accuracy",
    "dropout",
    "mask",
    "parameter-modified",
    "global-state",
    "error",
)

#: What exact adds to twice eager's error, relative to the reference's root mean square.
EXACT_RELATIVE = 1e-6
EXACT_FACTOR = 2.0
#: In fp16 and bf16, where the order of a sum matters more; torch's rule for compiled code does the same.
EXACT_FACTOR_HALF = 3.0
#: Where the reference is no wider than eager (an operator without an fp64 path), eager's own error is
#: unknown; this is what torch grants compiled code on top of it.
ASSUMED_RELATIVE = 1e-5
#: Below this many elements a root mean square says little about chance.
FEW = 64
PRODUCTION_FACTOR = 1.5
PRODUCTION_RELATIVE = 5e-2
PRODUCTION_KL = 1e-2
PRODUCTION_TOP1 = 0.99
AGGRESSIVE_COSINE = 0.99
AGGRESSIVE_KL = 5e-2
#: Cosine 0.99 at equal norms is a relative error of sqrt(2 - 2 * 0.99); it also bounds the norm, which
#: a cosine does not see.
AGGRESSIVE_RELATIVE = math.sqrt(2.0 - 2.0 * AGGRESSIVE_COSINE)
#: Share of integer and flag outputs that must agree where eager and the reference do.
INTEGER_AGREEMENT: Mapping[Level, float] = {"exact": 1.0, "production": 0.99, "aggressive": 0.95}


@dataclass(frozen=True)
class Verdict:
    """A judgement. ``rule`` is "ok" or the `RULES` entry that rejected; ``figures`` are what was measured."""

    passed: bool
    rule: str = "ok"
    detail: str = ""
    figures: dict[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.passed

    def named(self, rule: str, detail: str = "") -> Verdict:
        """The same verdict, a rejection renamed to what revealed it (``size``, ``stride``)."""
        if self.passed:
            return self
        return replace(self, rule=rule, detail=f"{detail}: {self.detail}" if detail else self.detail)


def rejected(rule: str, detail: str, figures: Mapping[str, float] | None = None) -> Verdict:
    """A rejection under one of `RULES`."""
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; the rules are {', '.join(RULES)}")
    return Verdict(False, rule, detail, dict(figures or {}))


def passed(detail: str = "", figures: Mapping[str, float] | None = None) -> Verdict:
    """An acceptance."""
    return Verdict(True, "ok", detail, dict(figures or {}))


def sampling(elements: int) -> float:
    """How much a root mean square of ``elements`` samples may be off by chance, as a factor.

    A scalar loss can be right to the last bit by luck; twice its error of zero would reject everybody.
    """
    return 1.0 + 4.0 / math.sqrt(max(elements, 1))


@dataclass(frozen=True)
class _Terms:
    """What a judgement depends on besides the tensors."""

    level: Level
    compute_dtype: torch.dtype | None
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)
    logits: frozenset[str] = frozenset()
    floor: float = 0.0
    rule: str = "value"

    def is_logits(self, name: str, tensor: torch.Tensor) -> bool:
        return (
            (name in self.logits or outputs.is_logits(name)) and tensor.dim() >= 1 and tensor.shape[-1] >= 2
        )


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
    wrong = _judge_structure(candidate, eager)
    if wrong is not None:
        return wrong
    alias = new_aliases(candidate, eager, inputs, eager_inputs)
    if alias is not None:
        return rejected("structure", alias)
    masks = {"": mask} if isinstance(mask, torch.Tensor) else dict(mask or {})
    terms = _Terms(level, dtype, masks, frozenset(logits), rule=rule)
    wide, cast = outputs.tensors(reference), outputs.tensors(cast_eager)
    figures: dict[str, float] = {}
    for mine, own in zip(outputs.leaves(candidate), outputs.leaves(eager), strict=True):
        if not mine.is_tensor:
            continue
        expected = wide.get(mine.name)
        if expected is None or expected.shape != own.value.shape:
            return rejected(
                "structure", f"the reference has no {mine.name} of shape {tuple(own.value.shape)}"
            )
        verdict = _judge_leaf(mine.name, mine.value, expected, own.value, cast.get(mine.name), terms)
        _keep_worst(figures, verdict.figures)
        if not verdict.passed:
            return replace(verdict, figures=figures)
    return passed(figures=figures)


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
    the tolerance also grows with 1 % of the root mean square over all gradients.
    """
    _check_level(level)
    dtype = as_dtype(compute_dtype)
    if set(candidate) != set(eager):
        names = sorted(set(candidate) ^ set(eager))
        return rejected("gradient", f"gradients differ in their names: {', '.join(names[:5])}")
    total, elements = 0.0, 0
    for expected in reference.values():
        if expected is not None:
            measured = outputs.distance(expected, expected)
            total += measured.scale**2 * measured.elements
            elements += measured.elements
    terms = _Terms(level, dtype, floor=0.01 * math.sqrt(total / max(elements, 1)), rule="gradient")
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
        verdict = _judge_leaf(name, mine, expected, own, cast, terms)
        _keep_worst(figures, verdict.figures)
        if not verdict.passed:
            return replace(verdict, rule="gradient", figures=figures)
    return passed(figures=figures)


def judge_dropout(candidate: list[Any], eager: list[Any], *, tolerance: float = 0.25) -> Verdict:
    """Judge the rate of dropout by how much outputs of one call vary from seed to seed.

    ``candidate`` and ``eager`` hold outputs for as many seeds each (8 or more). The standard deviation
    over seeds must agree within ``tolerance``; where eager's outputs do not vary, the candidate's must not.
    """
    figures: dict[str, float] = {}
    theirs = _spread(eager)
    for name, mine in _spread(candidate).items():
        own = theirs.get(name, 0.0)
        if own == 0.0 and mine == 0.0:
            continue
        ratio = mine / own if own else math.inf
        _keep_worst(figures, {"dropout_ratio": max(ratio, 1.0 / ratio if ratio else math.inf)})
        if abs(ratio - 1.0) > tolerance:
            return rejected(
                "dropout", f"{name} varies {ratio:.3g} times as much over seeds as in eager mode", figures
            )
    return passed(figures=figures)


def _spread(runs: list[Any]) -> dict[str, float]:
    """Root mean square over elements of the standard deviation over runs, by leaf name."""
    named = [outputs.tensors(run) for run in runs]
    spread: dict[str, float] = {}
    for name, first in named[0].items():
        if first.is_floating_point():
            stacked = torch.stack([run[name].detach().to(torch.float64) for run in named])
            spread[name] = float(stacked.var(dim=0).mean().sqrt())
    return spread


def judge_inputs(before: Any, after: Any) -> Verdict:
    """Reject under ``input-modified`` if a call's arguments are not bit for bit what they were."""
    changed = outputs.identical(before, after)
    return passed() if changed is None else rejected("input-modified", f"input {changed} was modified")


def judge_strides(candidate: Any, eager: Any) -> Verdict:
    """Reject under ``stride`` an output that is not contiguous where eager's is: ``view`` fails on it.

    That holds for what a caller gets at hand; what lies deeper (layers of a cache) is read by the model
    itself.
    """
    own = {path: leaf for path, leaf in tree.walk(eager) if isinstance(leaf, torch.Tensor)}
    for path, mine in tree.walk(candidate):
        theirs = own.get(path)
        if len(path) > 1 or theirs is None or not isinstance(mine, torch.Tensor):
            continue
        plain = mine.layout is torch.strided and theirs.layout is torch.strided
        if plain and theirs.is_contiguous() and not mine.is_contiguous():
            strides = f"the strides {list(mine.stride())}, eager's {list(theirs.stride())}"
            return rejected("stride", f"{tree.spell(path)} has {strides}")
    return passed()


def judge_held(candidate: Any, eager: Any) -> Verdict:
    """Reject under ``replay`` an output whose memory somebody holds after the call, unlike eager's: it will
    be answered with again, or written to by a later call."""
    own = outputs.tensors(eager)
    for name, mine in outputs.tensors(candidate).items():
        if name in own and holders(mine) > holders(own[name]):
            gc.collect()  # what only waits for the collector holds nothing
            if holders(mine) > holders(own[name]):
                return rejected("replay", f"{name} is held after the call, unlike in eager mode")
    return passed()


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


def _judge_structure(candidate: Any, eager: Any) -> Verdict | None:
    if tree.structure(candidate) != tree.structure(eager):
        return rejected("structure", _difference(candidate, eager))
    for mine, own in zip(outputs.leaves(candidate), outputs.leaves(eager), strict=True):
        if mine.is_tensor != own.is_tensor:
            return rejected(
                "structure", f"{mine.name} is {type(mine.value).__name__}, eager's {type(own.value).__name__}"
            )
        if not mine.is_tensor:
            if tree.is_atom(own.value) and not _equal(mine.value, own.value):
                return rejected("value", f"{mine.name} is {mine.value!r}, eager's {own.value!r}")
            continue
        if _class_of(mine.value) is not _class_of(own.value):
            return rejected(
                "structure",
                f"{mine.name} is a {type(mine.value).__name__}, eager's {type(own.value).__name__}",
            )
        if mine.value.is_inference() != own.value.is_inference():
            made = "in" if mine.value.is_inference() else "outside of"
            return rejected("structure", f"{mine.name} was made {made} inference mode, unlike eager's")
        if mine.value.shape != own.value.shape:
            return rejected(
                "shape", f"{mine.name} is {tuple(mine.value.shape)}, eager's {tuple(own.value.shape)}"
            )
        if mine.value.dtype != own.value.dtype:
            return rejected("dtype", f"{mine.name} is {mine.value.dtype}, eager's {own.value.dtype}")
        if mine.value.device != own.value.device or mine.value.layout != own.value.layout:
            return rejected(
                "structure",
                f"{mine.name} is {mine.value.layout} on {mine.value.device}, "
                f"eager's {own.value.layout} on {own.value.device}",
            )
    return None


def _class_of(tensor: torch.Tensor) -> type:
    """The tensor's class; parameters and buffers are plain tensors to whoever gets them."""
    plain = (torch.nn.Parameter, torch.nn.Buffer)
    return torch.Tensor if isinstance(tensor, plain) else type(tensor)


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=1e-5) or (math.isnan(first) and math.isnan(second))
    return bool(first == second)


def _difference(candidate: Any, eager: Any) -> str:
    mine = {tree.spell(path): type(leaf).__name__ for path, leaf in tree.walk(candidate)}
    own = {tree.spell(path): type(leaf).__name__ for path, leaf in tree.walk(eager)}
    if mine == own:
        return (
            f"the output is a {type(candidate).__name__}, eager's a {type(eager).__name__}, or differs inside"
        )
    names = [name for name in {**mine, **own} if mine.get(name) != own.get(name)]
    return f"the outputs differ at {', '.join(names[:5])}"


def _judge_leaf(
    name: str,
    candidate: torch.Tensor,
    reference: torch.Tensor,
    eager: torch.Tensor,
    cast: torch.Tensor | None,
    terms: _Terms,
) -> Verdict:
    if candidate.device.type == "meta" or candidate.numel() == 0:
        return passed()
    figures: dict[str, float] = {}
    mask = outputs.mask_for(name, eager, terms.masks)
    if mask is not None:
        if candidate.is_floating_point():
            figures["whole_relative_error"] = outputs.relative_error(candidate, reference)
        candidate, reference, eager = (
            outputs.select_valid(tensor, mask) for tensor in (candidate, reference, eager)
        )
        cast = None if cast is None else outputs.select_valid(cast, mask)
    if not (candidate.is_floating_point() or candidate.is_complex()):
        return _judge_integers(name, candidate, reference, eager, terms)
    measured = outputs.distance(candidate, reference, eager)
    figures["relative_error"] = measured.relative
    if measured.misfits:
        detail = f"{name} has {measured.misfits} NaN or infinite elements where the reference has none"
        return rejected("nan", detail, figures)
    if measured.mismatches:
        return rejected(
            terms.rule, f"{name} differs at {measured.mismatches} NaN or infinite elements", figures
        )
    if terms.level == "aggressive" and terms.compute_dtype is not None:
        return _aggressive(name, candidate, reference, measured, figures, terms)
    if terms.level == "production" and terms.compute_dtype is not None:
        return _production(name, candidate, reference, eager, cast, measured, figures, terms)
    return _exact(name, candidate, reference, eager, measured, figures, terms)


def _judge_integers(
    name: str, candidate: torch.Tensor, reference: torch.Tensor, eager: torch.Tensor, terms: _Terms
) -> Verdict:
    """Integers and flags must agree where eager and the reference do; elsewhere the choice was a tie."""
    mine, expected, own = (
        tensor.detach().cpu().int_repr() if tensor.is_quantized else tensor.detach().cpu()
        for tensor in (candidate, reference, eager)
    )
    certain = own.to(expected.dtype) == expected
    wrong = int((certain & (mine != own)).sum())
    share = 1.0 - wrong / max(int(certain.sum()), 1)
    required = INTEGER_AGREEMENT[terms.level] if terms.compute_dtype is not None else 1.0
    if share < required:
        return rejected(terms.rule, f"{name} agrees in {share:.2%} of its integers", {"agreement": share})
    return passed(figures={"agreement": share})


def _attainable(own: float, reference: torch.Tensor, dtype: torch.dtype, measured: outputs.Distance) -> float:
    """The error that can be asked for: ``own``, but never less than rounding the reference to ``dtype``.

    Few elements may all be near a representable number, so that their own rounding says nothing; for
    these it is half a unit in the last place.
    """
    if measured.elements < FEW and dtype.is_floating_point:
        rounding = 0.5 * torch.finfo(dtype).eps * measured.scale
    else:
        rounding = outputs.rounding_error(reference, dtype)
    return max(sampling(measured.elements) * own, rounding)


def _relative_part(measured: outputs.Distance, terms: _Terms) -> float:
    return sampling(measured.elements) * EXACT_RELATIVE * max(measured.scale, terms.floor)


def _exact(
    name: str,
    candidate: torch.Tensor,
    reference: torch.Tensor,
    eager: torch.Tensor,
    measured: outputs.Distance,
    figures: dict[str, float],
    terms: _Terms,
) -> Verdict:
    own = outputs.distance(eager, reference, eager).error
    attainable = _attainable(own, reference, eager.dtype, measured)
    if reference.dtype == eager.dtype and eager.dtype != torch.float64:
        attainable = max(attainable, ASSUMED_RELATIVE * measured.scale)
    factor = EXACT_FACTOR_HALF if eager.dtype in (torch.float16, torch.bfloat16) else EXACT_FACTOR
    limit = factor * attainable + _relative_part(measured, terms)
    figures["limit_ratio"] = _ratio(measured.error, limit)
    if measured.error <= limit:
        return passed(figures=figures)
    return rejected(
        terms.rule,
        f"{name} has an rms error of {measured.error:.3g} (relative {measured.relative:.3g}); "
        f"eager's is {own:.3g} and {limit:.3g} is allowed",
        figures,
    )


def _production(
    name: str,
    candidate: torch.Tensor,
    reference: torch.Tensor,
    eager: torch.Tensor,
    cast: torch.Tensor | None,
    measured: outputs.Distance,
    figures: dict[str, float],
    terms: _Terms,
) -> Verdict:
    assert terms.compute_dtype is not None
    if cast is not None and cast.shape == reference.shape:
        theirs = outputs.distance(cast, reference, eager)
        attainable = _attainable(theirs.error, reference, terms.compute_dtype, measured)
        limit = PRODUCTION_FACTOR * attainable + _relative_part(measured, terms)
        figures["limit_ratio"] = _ratio(measured.error, limit)
        if not theirs.misfits and measured.error > limit:
            return rejected(
                terms.rule,
                f"{name} has an rms error of {measured.error:.3g} (relative {measured.relative:.3g}); "
                f"eager in {terms.compute_dtype} has {theirs.error:.3g} and {limit:.3g} is allowed",
                figures,
            )
    bound = PRODUCTION_RELATIVE * max(measured.scale, terms.floor)
    if measured.error <= bound:
        return passed(figures=figures)
    if terms.rule == "gradient" and cast is not None and measured.cosine >= AGGRESSIVE_COSINE:
        return passed(figures=figures)  # no worse than eager in that dtype, and it points the same way
    if terms.is_logits(name, candidate):
        figures["kl"] = outputs.kl_divergence(candidate, reference)
        figures["top1"] = outputs.top1_agreement(candidate, reference, eager)
        if figures["kl"] <= PRODUCTION_KL and figures["top1"] >= PRODUCTION_TOP1:
            return passed(figures=figures)
        detail = f"{name} has KL {figures['kl']:.3g} and top-1 agreement {figures['top1']:.2%}"
        return rejected(terms.rule, detail, figures)
    return rejected(
        terms.rule,
        f"{name} has a relative error of {measured.relative:.3g}; {PRODUCTION_RELATIVE} is allowed",
        figures,
    )


def _aggressive(
    name: str,
    candidate: torch.Tensor,
    reference: torch.Tensor,
    measured: outputs.Distance,
    figures: dict[str, float],
    terms: _Terms,
) -> Verdict:
    figures["cosine"], figures["norm_ratio"] = measured.cosine, measured.norm_ratio
    negligible = measured.error <= AGGRESSIVE_RELATIVE * max(measured.scale, terms.floor)
    if measured.elements < 16:  # the cosine of few elements is nearly a sign
        wrong = not negligible
    else:
        off = abs(measured.norm_ratio - 1.0) > AGGRESSIVE_RELATIVE
        wrong = not negligible and (measured.cosine < AGGRESSIVE_COSINE or off)
    if wrong:
        return rejected(
            terms.rule,
            f"{name} has cosine {measured.cosine:.4f} (at least {AGGRESSIVE_COSINE}), norm ratio "
            f"{measured.norm_ratio:.3f}, relative error {measured.relative:.3g}",
            figures,
        )
    if terms.is_logits(name, candidate):
        figures["kl"] = outputs.kl_divergence(candidate, reference)
        if figures["kl"] > AGGRESSIVE_KL:
            return rejected(
                terms.rule, f"{name} has KL {figures['kl']:.3g}; {AGGRESSIVE_KL} is allowed", figures
            )
    return passed(figures=figures)


def _ratio(error: float, limit: float) -> float:
    return error / limit if limit else (0.0 if error == 0.0 else math.inf)


#: Figures of which the smallest value over all leaves is the worst.
_SMALLEST = frozenset({"cosine", "top1", "agreement"})


def _keep_worst(figures: dict[str, float], new: Mapping[str, float]) -> None:
    for name, value in new.items():
        worst = min if name in _SMALLEST else max
        figures[name] = worst(figures[name], value) if name in figures else value
