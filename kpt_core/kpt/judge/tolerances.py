"""How far one output may be from the reference: the numbers of each level, and the rules that use them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from kpt.judge import distances, outputs
from kpt.judge.verdict import Verdict, passed, rejected
from kpt.specs import Level

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
#: What has less than this share of the error that is allowed will have no more than that on other inputs.
CLEAR = 0.9
#: A gradient of next to nothing may be off by as many times what is allowed at the floor of all gradients
#: if eager's own cast is as far off: BERT-base's key biases, whose gradient is zero, by 1.6 times in bf16.
VANISHING = 2.5
AGGRESSIVE_COSINE = 0.99
AGGRESSIVE_KL = 5e-2
#: The cosine of fewer elements is nearly a sign.
_DIRECTED = 16
#: Cosine 0.99 at equal norms is a relative error of sqrt(2 - 2 * 0.99); it also bounds the norm, which
#: a cosine does not see.
AGGRESSIVE_RELATIVE = math.sqrt(2.0 - 2.0 * AGGRESSIVE_COSINE)
#: Share of integer and flag outputs that must agree where eager and the reference do.
INTEGER_AGREEMENT: Mapping[Level, float] = {"exact": 1.0, "production": 0.99, "aggressive": 0.95}


def sampling(elements: int) -> float:
    """How much a root mean square of ``elements`` samples may be off by chance, as a factor.

    A scalar loss can be right to the last bit by luck; twice its error of zero would reject everybody.
    """
    return 1.0 + 4.0 / math.sqrt(max(elements, 1))


@dataclass(frozen=True)
class Terms:
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


def judge_leaf(
    name: str,
    candidate: torch.Tensor,
    reference: torch.Tensor,
    eager: torch.Tensor,
    cast: torch.Tensor | None,
    terms: Terms,
) -> Verdict:
    if candidate.device.type == "meta" or candidate.numel() == 0:
        return passed()
    figures: dict[str, float] = {}
    mask = outputs.mask_for(name, eager, terms.masks)
    if mask is not None:
        if candidate.is_floating_point():
            figures["whole_relative_error"] = distances.relative_error(candidate, reference)
        candidate, reference, eager = (
            outputs.select_valid(tensor, mask) for tensor in (candidate, reference, eager)
        )
        cast = None if cast is None else outputs.select_valid(cast, mask)
    if not (candidate.is_floating_point() or candidate.is_complex()):
        return _judge_integers(name, candidate, reference, eager, terms)
    measured = distances.distance(candidate, reference, eager)
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
    name: str, candidate: torch.Tensor, reference: torch.Tensor, eager: torch.Tensor, terms: Terms
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


def _attainable(
    own: float, reference: torch.Tensor, dtype: torch.dtype, measured: distances.Distance
) -> float:
    """The error that can be asked for: ``own``, but never less than rounding the reference to ``dtype``.

    Few elements may all be near a representable number, so that their own rounding says nothing; for
    these it is half a unit in the last place.
    """
    if measured.elements < FEW and dtype.is_floating_point:
        rounding = 0.5 * torch.finfo(dtype).eps * measured.scale
    else:
        rounding = distances.rounding_error(reference, dtype)
    return max(sampling(measured.elements) * own, rounding)


def _relative_part(measured: distances.Distance, terms: Terms) -> float:
    return sampling(measured.elements) * EXACT_RELATIVE * max(measured.scale, terms.floor)


def _exact(
    name: str,
    candidate: torch.Tensor,
    reference: torch.Tensor,
    eager: torch.Tensor,
    measured: distances.Distance,
    figures: dict[str, float],
    terms: Terms,
) -> Verdict:
    own = distances.distance(eager, reference, eager).error
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
        excess=figures["limit_ratio"],
    )


def _production(
    name: str,
    candidate: torch.Tensor,
    reference: torch.Tensor,
    eager: torch.Tensor,
    cast: torch.Tensor | None,
    measured: distances.Distance,
    figures: dict[str, float],
    terms: Terms,
) -> Verdict:
    assert terms.compute_dtype is not None
    missed, as_good = "", False
    if cast is not None and cast.shape == reference.shape:
        theirs = distances.distance(cast, reference, eager)
        attainable = _attainable(theirs.error, reference, terms.compute_dtype, measured)
        limit = PRODUCTION_FACTOR * attainable + _relative_part(measured, terms)
        figures["limit_ratio"] = _ratio(measured.error, limit)
        as_good = not theirs.misfits and measured.error <= limit
        if not theirs.misfits and not as_good:
            missed = (
                f"{name} has an rms error of {measured.error:.3g} (relative {measured.relative:.3g}); "
                f"eager in {terms.compute_dtype} has {theirs.error:.3g} and {limit:.3g} is allowed"
            )
    absolute = _absolute(name, candidate, reference, eager, as_good, measured, figures, terms)
    if not missed:
        return absolute
    excess = max(figures["limit_ratio"], absolute.excess)  # a call may miss both
    return rejected(terms.rule, missed, figures, excess=excess)


def _absolute(
    name: str,
    candidate: torch.Tensor,
    reference: torch.Tensor,
    eager: torch.Tensor,
    as_good: bool,
    measured: distances.Distance,
    figures: dict[str, float],
    terms: Terms,
) -> Verdict:
    """What is allowed whatever the eager model does in that dtype; ``as_good``: it is no better there."""
    bound = PRODUCTION_RELATIVE * max(measured.scale, terms.floor)
    share = _ratio(measured.error, bound)
    scores = share > CLEAR and terms.rule != "gradient" and terms.is_logits(name, candidate)
    if scores:  # of the error and these either will do
        figures["kl"] = distances.kl_divergence(candidate, reference)
        figures["top1"] = distances.top1_agreement(candidate, reference, eager)
        # Means, of which the number of positions says what they are worth.
        figures["scored_positions"] = candidate.numel() // candidate.shape[-1]
        if figures["top1"] >= PRODUCTION_TOP1:
            share = min(share, figures["kl"] / PRODUCTION_KL)
    if share <= 1.0:
        if scores and math.isnan(figures["kl"]):  # where a whole row is masked
            del figures["kl"]
        return passed(figures=figures, excess=share)
    if terms.rule == "gradient" and as_good:
        # It points the same way and as far, or there is nothing to point along and all of it is rounding.
        nothing = measured.scale <= PRODUCTION_RELATIVE * terms.floor
        if nothing and measured.error <= VANISHING * bound:
            return passed(figures=figures)
        along = measured.cosine >= AGGRESSIVE_COSINE and abs(measured.norm_ratio - 1.0) <= AGGRESSIVE_RELATIVE
        if along and (
            measured.elements >= _DIRECTED or measured.error <= AGGRESSIVE_RELATIVE * measured.scale
        ):
            return passed(figures=figures)
    if scores:
        detail = f"{name} has KL {figures['kl']:.3g} and top-1 agreement {figures['top1']:.2%}"
        return rejected(terms.rule, detail, figures, excess=share)
    detail = f"{name} has a relative error of {measured.relative:.3g}; {PRODUCTION_RELATIVE} is allowed"
    return rejected(terms.rule, detail, figures, excess=share)


def _aggressive(
    name: str,
    candidate: torch.Tensor,
    reference: torch.Tensor,
    measured: distances.Distance,
    figures: dict[str, float],
    terms: Terms,
) -> Verdict:
    figures["cosine"], figures["norm_ratio"] = measured.cosine, measured.norm_ratio
    bound = AGGRESSIVE_RELATIVE * max(measured.scale, terms.floor)
    share = excess = _ratio(measured.error, bound)
    if measured.elements >= _DIRECTED:  # then it will do to point the same way, about as far
        turned = (1.0 - measured.cosine) / (1.0 - AGGRESSIVE_COSINE)
        share = min(share, max(turned, abs(measured.norm_ratio - 1.0) / AGGRESSIVE_RELATIVE))
    if not share <= 1.0:
        return rejected(
            terms.rule,
            f"{name} has cosine {measured.cosine:.4f} (at least {AGGRESSIVE_COSINE}), norm ratio "
            f"{measured.norm_ratio:.3f}, relative error {measured.relative:.3g}",
            figures,
            excess=excess,
        )
    if terms.is_logits(name, candidate):
        figures["kl"] = distances.kl_divergence(candidate, reference)
        share = max(share, figures["kl"] / AGGRESSIVE_KL)
        if figures["kl"] > AGGRESSIVE_KL:
            return rejected(
                terms.rule,
                f"{name} has KL {figures['kl']:.3g}; {AGGRESSIVE_KL} is allowed",
                figures,
                excess=figures["kl"] / AGGRESSIVE_KL,
            )
    return passed(figures=figures, excess=share)


def _ratio(error: float, limit: float) -> float:
    return error / limit if limit else (0.0 if error == 0.0 else math.inf)


#: Figures of which the smallest value over all leaves is the worst.
_SMALLEST = frozenset({"cosine", "top1", "agreement", "scored_positions"})


def keep_worst(figures: dict[str, float], new: Mapping[str, float]) -> None:
    for name, value in new.items():
        worst = min if name in _SMALLEST else max
        figures[name] = worst(figures[name], value) if name in figures else value
