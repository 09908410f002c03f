"""Compare two runs: values, gradients, and what they wrote to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)


def versions_of(twin: torch.nn.Module, bound: dict[str, Any]) -> list[int]:
    """Version counters of what a run could write to: parameters, buffers and arguments."""
    state = [*twin.parameters(), *twin.buffers(), *tensors(bound)]
    return [t._version for t in state]


def gradients_of(out: Any, leaves: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """Of a weighted sum of the outputs, by leaf."""
    total: torch.Tensor | None = None
    for tensor in tensors(out):
        if tensor.requires_grad:
            # any vector without structure will do; a random one would be refused in here
            weight = torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device).mul(2.3).cos()
            term = (tensor * weight.view(tensor.shape)).sum()
            total = term if total is None else total + term
    if total is None:
        return [None] * len(leaves)
    # A backward pass may fail in here, which the user's anomaly mode would report as an error of the model's.
    with torch.autograd.set_detect_anomaly(False):
        return list(torch.autograd.grad(total, leaves, allow_unused=True))


def difference(one: Any, other: Any) -> float:
    """The largest difference relative to the largest value; infinite when the structures differ."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.shape != other.shape:
            return float("inf")
        if one.numel() == 0:
            return 0.0
        a, b = one.detach(), other.detach()
        if not a.is_floating_point():
            return 0.0 if bool((a == b).all()) else float("inf")
        a, b = a.double(), b.double()
        apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
        scale = float(torch.where(b.isfinite(), b.abs(), 0.0).max())
        worst = float(apart.max())
        if worst != worst:
            return float("inf")
        return worst / max(scale, 1e-300) if worst else 0.0
    if type(one) is not type(other):
        return float("inf")
    if isinstance(one, (tuple, list)):
        if len(one) != len(other):
            return float("inf")
        return max((difference(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return float("inf")
        return max((difference(one[key], other[key]) for key in one), default=0.0)
    return 0.0 if one is other or one == other else float("inf")
