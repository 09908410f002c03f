"""group_norm."""

from __future__ import annotations

import torch


def group_norm(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
) -> torch.Tensor:
    """Normalise ``x`` (N, C, ...) over each of ``groups`` groups of channels.

    ``weight`` and ``bias`` [C] scale and shift; ``activation`` None or silu follows. Wu and He 2018,
    arXiv:1803.08494.
    """
    if activation not in (None, "silu"):
        raise ValueError(f"activation {activation!r} is neither None nor 'silu'")
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    flat = wide.reshape(x.shape[0], groups, -1)
    centred = flat - flat.mean(-1, keepdim=True)
    out = (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)).reshape(x.shape)
    shape = (1, -1) + (1,) * (x.dim() - 2)
    if weight is not None:
        out = out * weight.to(out.dtype).view(shape)
    if bias is not None:
        out = out + bias.to(out.dtype).view(shape)
    if activation == "silu":
        out = torch.nn.functional.silu(out)
    return out.to(x.dtype)
