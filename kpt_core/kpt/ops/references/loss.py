"""cross_entropy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from kpt.ops.binding import Hypothesis
from kpt.ops.captured import Seen
from kpt.specs import OpSpec

if TYPE_CHECKING:
    from kpt.ops.captured import Captured


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """Cross entropy of ``logits`` (N, C) with class indices ``target`` (N,).

    ``weight`` (C,) weighs classes; targets equal to ``ignore_index`` do not count, whatever their logits;
    ``label_smoothing`` spreads that share of each target over all classes. Returns a scalar, or
    (N,) with ``reduction="none"``.
    """
    logs = torch.log_softmax(logits, dim=-1)
    counts = target != ignore_index
    safe = torch.where(counts, target, torch.zeros_like(target))
    given = torch.ones_like(logs[0]) if weight is None else weight.to(logs.dtype)
    factor = torch.where(counts, given[safe], torch.zeros_like(given[safe]))
    picked = -logs.gather(-1, safe[:, None])[:, 0]
    # Not by a product with zero alone: the class that stands in for an ignored one may be ruled out (-inf).
    loss = torch.where(counts, picked, torch.zeros_like(picked)) * factor
    if label_smoothing:
        spread = -(logs * given).sum(-1) / logs.shape[-1]
        spread = torch.where(counts, spread, torch.zeros_like(spread))
        loss = (1 - label_smoothing) * loss + label_smoothing * spread
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction != "mean":
        raise ValueError(f"reduction {reduction!r} is not one of mean, sum, none")
    return loss.sum() / factor.sum()


_SHIFTED = "torch.nn.functional.pad({}, (0, 1), value={})[..., 1:].flatten()"


class Losses:
    """Proposes cross_entropy for a loss module or function of logits and integer targets."""

    def hypotheses(self, module: torch.nn.Module, captured: Captured) -> Iterator[Hypothesis]:
        held = vars(module)
        options = {}
        if isinstance(module._buffers.get("weight"), torch.Tensor):
            options["weight"] = "self.weight"
        for name in ("ignore_index", "label_smoothing", "reduction"):
            if name in held:
                options[name] = f"self.{name}"
        yield from self._claims(captured, options)

    def function_hypotheses(self, module: torch.nn.Module, captured: Captured) -> Iterator[Hypothesis]:
        call = captured.calls[0]
        options = {
            name: name
            for name in ("weight", "ignore_index", "label_smoothing", "reduction")
            if call.get(name) is not None
        }
        yield from self._claims(captured, options)

    def _claims(self, captured: Captured, options: dict[str, str]) -> Iterator[Hypothesis]:
        tensors = {n: t for n, t in captured.tensors().items() if n != "weight"}
        if len(tensors) != 2 or not isinstance(captured.output, Seen):
            return
        logits = [n for n, t in tensors.items() if t.dtype.is_floating_point and len(t.shape) >= 2]
        target = [n for n, t in tensors.items() if t.dtype == torch.int64]
        if len(logits) != 1 or len(target) != 1:
            return
        if (
            captured.output.shape not in ((), tensors[target[0]].shape)
            or not captured.output.dtype.is_floating_point
        ):
            return
        (x,), (y,) = logits, target
        rank, labels = len(tensors[x].shape), tensors[y].shape
        classes = (
            tensors[x].shape[-1] if rank == 2 or labels == tensors[x].shape[:-1] else tensors[x].shape[1]
        )
        limits = {y: (0, classes)}
        ignored = options.get("ignore_index", "-100")
        if rank == 2 and len(labels) == 1:
            yield Hypothesis("cross_entropy", {"logits": x, "target": y, **options}, integers=limits)
            yield Hypothesis(
                "cross_entropy", {"logits": f"{x}.float()", "target": y, **options}, integers=limits
            )
        if rank == 3 and labels == tensors[x].shape[:-1]:
            for cast in (".float()", ""):
                flat = {"logits": f"{x}{cast}.flatten(0, -2)", **options}
                yield Hypothesis("cross_entropy", {**flat, "target": f"{y}.flatten()"}, integers=limits)
                yield Hypothesis(
                    "cross_entropy", {**flat, "target": _SHIFTED.format(y, ignored)}, integers=limits
                )
        if (
            rank >= 3
            and labels == (tensors[x].shape[0], *tensors[x].shape[2:])
            and captured.output.shape == ()
        ):
            flat = {"logits": f"{x}.movedim(1, -1).flatten(0, -2)", **options}
            yield Hypothesis("cross_entropy", {**flat, "target": f"{y}.flatten()"}, integers=limits)


_HOME = "kpt.ops.references.loss"
SPECS = (
    OpSpec(
        "cross_entropy",
        "(logits, target, weight=None, ignore_index=-100, label_smoothing=0.0, reduction='mean') -> loss",
        f"{_HOME}:cross_entropy",
        f"{_HOME}:Losses",
        "cross entropy of logits (N, C) with class indices (N,)",
    ),
)
