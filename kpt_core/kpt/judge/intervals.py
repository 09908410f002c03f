"""Medians and their bootstrap intervals, of one sample and of samples of several kinds taken together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch

_RESAMPLES = 1000
#: Values of each kind below which several together claim no more than their range.
LEAST_OF_A_KIND = 3
#: The same where it is most of the calls: the range of three values is too narrow for what all hangs on.
_LEAST_OF_MOST = 5
#: Equal sides have all of five ratios above 1 in 3 cases of 100.
_LEAST_TOGETHER = 5


def interval(values: Sequence[float], confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval of the median; the range of 3 to 5 values; (0, infinity) for fewer."""
    number = len(values)
    if number < 3:
        return 0.0, math.inf
    if number < 6:  # resampling so few values understates the doubt
        return min(values), max(values)
    generator = torch.Generator().manual_seed(seed)
    return _tails(_medians(torch.tensor(values, dtype=torch.float64), generator), confidence)


def middle(groups: Sequence[Sequence[float]], shares: Sequence[float]) -> float:
    """The geometric mean of the groups' medians, each weighed with its share of 1; empty groups are left out.

    Of one group it is the median.

    Raises:
        ValueError: every group is empty.
    """
    present = [(group, share) for group, share in zip(groups, shares, strict=True) if group]
    if not present:
        raise ValueError("expected a value in one group at least, got none")
    if len(present) == 1:
        return statistics.median(present[0][0])
    total = sum(share for _, share in present)
    medians = [(statistics.median(group), share / total) for group, share in present]
    if any(value <= 0.0 for value, _ in medians):
        return 0.0
    return math.exp(sum(share * math.log(value) for value, share in medians))


def average(groups: Sequence[Sequence[float]], shares: Sequence[float]) -> float:
    """The arithmetic mean of the groups' medians, weighed with the shares; empty groups are left out."""
    present = [(statistics.median(own), share) for own, share in zip(groups, shares, strict=True) if own]
    return sum(value * share for value, share in present) / sum(share for _, share in present)


def stratified_interval(
    groups: Sequence[Sequence[float]], shares: Sequence[float], confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Interval of `middle` by resampling within each group (a stratified bootstrap).

    Deviations of a group of n are widened by the square root of n / (n - 1), which the bootstrap of few
    values lacks. The range of all values where a group has fewer than `LEAST_OF_A_KIND`, and (0, infinity)
    where one has none, or all together fewer than `_LEAST_TOGETHER`. Of one group it is that of `interval`.
    """
    if len(groups) == 1:
        return interval(groups[0], confidence, seed)
    pooled = [value for group in groups for value in group]
    if len(pooled) < _LEAST_TOGETHER or min(map(len, groups)) == 0 or min(pooled) <= 0.0:
        return 0.0, math.inf
    if min(map(len, groups)) < LEAST_OF_A_KIND:
        return min(pooled), max(pooled)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(_RESAMPLES, dtype=torch.float64)
    for group, share in zip(groups, shares, strict=True):
        total += share / sum(shares) * _resampled(group, generator)
    low, high = _tails(total, confidence)
    return math.exp(low), math.exp(high)


def total_interval(
    groups: Sequence[Sequence[float]],
    weights: Sequence[float],
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of the ratio of two totals, of which the first is the sum of ``weights``, one for each group.

    The second is the sum of the weights over the groups' medians, which are resampled as in
    `stratified_interval`. (0, infinity) where a group has no value, or one that is not positive.
    """
    if not all(groups) or min(map(min, groups)) <= 0.0:
        return 0.0, math.inf
    generator = torch.Generator().manual_seed(seed)
    after = torch.zeros(_RESAMPLES, dtype=torch.float64)
    for group, weight in zip(groups, weights, strict=True):
        after += weight * (-_resampled(group, generator)).exp()
    low, high = _tails(sum(weights) / after, confidence)
    return low, high


def least_of_a_kind(share: float) -> int:
    """How many values a kind that is ``share`` of all calls wants."""
    return _LEAST_OF_MOST if 0.5 < share < 1.0 else LEAST_OF_A_KIND


def spread(values: Sequence[float], center: float) -> float:
    """The relative median absolute deviation of ``values`` from ``center``."""
    return statistics.median(abs(value - center) for value in values) / center if center else 0.0


def _resampled(group: Sequence[float], generator: torch.Generator) -> torch.Tensor:
    """Logarithms of the medians of resamples of ``group``, spread as much as those of so few values are."""
    own = math.log(statistics.median(group))
    wider = math.sqrt(len(group) / max(len(group) - 1, 1))
    return own + wider * (_medians(torch.tensor(group, dtype=torch.float64).log(), generator) - own)


def _medians(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    number = len(values)
    picks = torch.randint(number, (_RESAMPLES, number), generator=generator)
    samples = values[picks].sort(dim=1).values
    return (samples[:, (number - 1) // 2] + samples[:, number // 2]) / 2.0


def _tails(resampled: torch.Tensor, confidence: float) -> tuple[float, float]:
    ordered = resampled.sort().values
    tail = int((1.0 - confidence) / 2.0 * _RESAMPLES)
    return float(ordered[tail]), float(ordered[_RESAMPLES - 1 - tail])
