"""A kernel for the op ``rms_norm``: torch's own fused one, for models that spell the norm out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kpt.ops.sites import Site


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, offset: float = 0.0
) -> torch.Tensor:
    """``x / sqrt(mean(x²) + eps) * (weight + offset)`` for ``x`` [..., hidden] and ``weight`` [hidden]."""
    if weight is not None and offset:
        weight = weight + offset
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


def supports(site: Site) -> str | None:
    """A reason to refuse ``site``, or None."""
    widest = max((shapes["x"][-1] for shapes in _shapes(site)), default=0)
    if widest > 16384:
        return f"the last dimension is {widest}; this kernel is tested up to 16384"
    return None


def _shapes(site: Site) -> list[dict[str, tuple[int, ...]]]:
    return [dict(example.shapes) for example in site.examples if "x" in example.shapes]
