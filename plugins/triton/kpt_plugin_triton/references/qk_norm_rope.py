"""qk_norm_rope."""

from __future__ import annotations

import torch

from kpt.ops import reference


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float = 1e-6,
    offset: float = 0.0,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """rms_norm over every head of ``q`` (B, H, S, D) and ``k`` (B, Hkv, S, D), then rope.

    ``q_weight`` and ``k_weight`` [D], plus ``offset``, scale the features; the rest as for rms_norm and rope.
    """
    norm = reference("rms_norm")
    return reference("rope")(  # type: ignore[no-any-return]
        norm(q, q_weight, eps, offset), norm(k, k_weight, eps, offset), cos, sin, interleaved
    )
