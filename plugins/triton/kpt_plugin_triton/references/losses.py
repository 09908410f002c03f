"""cross_entropy with a z-loss, linear_cross_entropy."""

from __future__ import annotations

import torch

from kpt.ops import reference


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    z_loss: float = 0.0,
) -> torch.Tensor:
    """The core's cross_entropy, plus ``z_loss * logsumexp(logits)**2`` for each row that counts.

    With ``weight``, a row's z-loss is weighed like its label.
    """
    if not z_loss:
        return reference("cross_entropy")(  # type: ignore[no-any-return]
            logits, target, weight, ignore_index, label_smoothing, reduction
        )
    rows = reference("cross_entropy")(logits, target, weight, ignore_index, label_smoothing, "none")
    counts = target != ignore_index
    safe = torch.where(counts, target, torch.zeros_like(target))
    factor = counts.to(logits.dtype) if weight is None else weight.to(logits.dtype)[safe] * counts
    total = torch.logsumexp(logits, dim=-1)
    # Not by a product with zero alone: the logits of a row that does not count may sum to infinity.
    rows = rows + z_loss * factor * torch.where(counts, total, torch.zeros_like(total)).square()
    if reduction == "none":
        return rows  # type: ignore[no-any-return]
    if reduction == "sum":
        return rows.sum()  # type: ignore[no-any-return]
    return rows.sum() / factor.sum()  # type: ignore[no-any-return]


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """The cross entropy of ``hidden`` [..., H] @ ``weight`` [V, H].T + ``bias`` [V] with ``target`` [...].

    ``softcap`` replaces logits by ``softcap * tanh(logits / softcap)``; ``z_loss`` is that of
    `cross_entropy`. Returns a scalar, or [...] with ``reduction="none"``.
    """
    logits = torch.nn.functional.linear(hidden.flatten(0, -2), weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = cross_entropy(logits, target.flatten(), None, ignore_index, label_smoothing, reduction, z_loss)
    return loss.view(target.shape) if reduction == "none" else loss
