"""How far one tensor is from another: errors, angles, divergences, measured in fp64 over bounded pieces."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kpt.judge.pieces import chunks, row_chunks


@dataclass(frozen=True)
class Distance:
    """How far ``values`` are from a reference, over the elements where both are finite.

    ``error`` and ``scale`` are root mean squares of the difference and of the reference; ``misfits``
    counts elements that are not finite although the reference's are, ``mismatches`` elements where
    the reference is not finite and the value is something else.
    """

    error: float
    scale: float
    cosine: float
    norm_ratio: float
    misfits: int
    mismatches: int
    elements: int

    @property
    def relative(self) -> float:
        """``error / scale``; 0 for equal values, infinite where the reference is all zero."""
        if self.error == 0.0:
            return 0.0
        return self.error / self.scale if self.scale else math.inf


def _finite_sums(
    value: torch.Tensor, expected: torch.Tensor, *own: torch.Tensor
) -> tuple[float, float, float, float] | None:
    """Sums of squares of the difference, of ``expected`` and of ``value``, and of their products.

    None where an element is not finite, which shows in the sums without a pass over memory for each question.
    """
    value, expected = value.reshape(-1), expected.reshape(-1)
    difference = value - expected
    pairs = ((difference, difference), (expected, expected), (value, value), (value, expected))
    sums = [torch.dot(left, right) for left, right in pairs]
    sums += [torch.dot(each.reshape(-1), each.reshape(-1)) for each in own]
    numbers: list[float] = torch.stack(sums).tolist()
    if not all(map(math.isfinite, numbers)):
        return None
    return numbers[0], numbers[1], numbers[2], numbers[3]


def distance(values: torch.Tensor, reference: torch.Tensor, eager: torch.Tensor | None = None) -> Distance:
    """Measure ``values`` against ``reference`` (same shape, any dtypes).

    With ``eager`` given, elements where the eager result is not finite count for nothing: it
    overflowed in its own dtype, and a candidate may do so too.
    """
    squares = reference_squares = value_squares = dot = 0.0
    counted = misfits = mismatches = 0
    operands = (values, reference) if eager is None else (values, reference, eager)
    for value, expected, *own in chunks(*operands):
        sums = _finite_sums(value, expected, *own)
        if sums is not None:
            squares, reference_squares = squares + sums[0], reference_squares + sums[1]
            value_squares, dot = value_squares + sums[2], dot + sums[3]
            counted += value.numel()
            continue
        finite, expected_finite = torch.isfinite(value), torch.isfinite(expected)
        judged = torch.isfinite(own[0]) if own else torch.ones_like(finite)
        misfits += int((~finite & expected_finite & judged).sum())
        same = (value == expected) | (torch.isnan(value) & torch.isnan(expected))
        strange = ~expected_finite & ~same
        if own:  # where eager itself is finite, or differs from the reference, it is no misfit to follow it
            strange &= ~judged & ~((value == own[0]) | (torch.isnan(value) & torch.isnan(own[0])))
        mismatches += int(strange.sum())
        both = finite & expected_finite & judged
        value, expected = torch.where(both, value, 0.0), torch.where(both, expected, 0.0)
        squares += float((value - expected).square().sum())
        reference_squares += float(expected.square().sum())
        value_squares += float(value.square().sum())
        dot += float((value * expected).sum())
        counted += int(both.sum())
    number = max(counted, 1)
    norms = math.sqrt(value_squares) * math.sqrt(reference_squares)
    cosine = dot / norms if norms else float(value_squares == reference_squares)
    ratio = math.sqrt(value_squares / reference_squares) if reference_squares else float(value_squares == 0.0)
    return Distance(
        error=math.sqrt(squares / number),
        scale=math.sqrt(reference_squares / number),
        cosine=max(-1.0, min(1.0, cosine)),
        norm_ratio=ratio,
        misfits=misfits,
        mismatches=mismatches,
        elements=counted,
    )


def rms(tensor: torch.Tensor) -> float:
    """Root mean square of the finite elements."""
    return distance(tensor, tensor).scale


def relative_error(values: torch.Tensor, reference: torch.Tensor) -> float:
    """Root mean square error relative to the reference's root mean square."""
    return distance(values, reference).relative


def cosine(values: torch.Tensor, reference: torch.Tensor) -> float:
    """Cosine similarity of the flattened tensors; 1 if both are all zero."""
    return distance(values, reference).cosine


def rounding_error(reference: torch.Tensor, dtype: torch.dtype) -> float:
    """Root mean square error of ``reference`` rounded to ``dtype``: what no result in ``dtype`` can beat."""
    if not dtype.is_floating_point or dtype == torch.float64:
        return 0.0
    squares, counted = 0.0, 0
    for (piece,) in chunks(reference):
        rounded = piece.to(dtype).to(torch.float64)
        finite = torch.isfinite(rounded) & torch.isfinite(piece)
        squares += float(torch.where(finite, rounded - piece, 0.0).square().sum())
        counted += int(finite.sum())
    return math.sqrt(squares / max(counted, 1))


def kl_divergence(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean over rows of KL(softmax(reference) || softmax(logits)) in nats, along the last axis."""
    total, rows = 0.0, 0
    for values, expected in row_chunks(logits, reference):
        log_p = torch.log_softmax(expected, dim=-1)
        log_q = torch.log_softmax(values, dim=-1)
        # A class that the reference rules out (-inf) contributes nothing.
        terms = torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q))
        total += float(terms.sum())
        rows += values.shape[0]
    return max(total / max(rows, 1), 0.0)


def top1_agreement(logits: torch.Tensor, reference: torch.Tensor, eager: torch.Tensor) -> float:
    """Share of rows with the reference's best class, among rows that eager itself decides.

    A row is undecided where the reference's margin between its best two classes is not larger than
    twice eager's largest error in that row. With no decided row the agreement is 1.
    """
    agreed, decided = 0, 0
    if reference.shape[-1] < 2:
        return 1.0
    for values, expected, own in row_chunks(logits, reference, eager):
        best = expected.topk(2, dim=-1)
        margin = best.values[:, 0] - best.values[:, 1]
        error = torch.nan_to_num(own - expected, nan=0.0, posinf=0.0, neginf=0.0).abs().amax(dim=-1)
        certain = margin > 2.0 * error
        agreed += int((certain & (values.argmax(dim=-1) == best.indices[:, 0])).sum())
        decided += int(certain.sum())
    return agreed / decided if decided else 1.0
