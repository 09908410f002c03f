"""quantise_fp8, silu_mul_fp8, rms_norm_fp8 and layer_norm_fp8."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kpt.ops import reference

#: Columns that share a scale in the mode "block".
GROUP = 128
#: An absolute maximum below this counts as this.
SMALLEST = 2.0**-100
MODES = ("row", "block", "tensor")


def scaled(
    value: torch.Tensor, mode: str, scale: torch.Tensor | None, dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(``value / scale`` in fp8, saturated; the scale in fp32), see `quantise_fp8`."""
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")
    dtype = dtype or torch.float8_e4m3fn
    most = torch.finfo(dtype).max
    columns = value.shape[-1]
    if scale is not None:
        if mode != "tensor":
            raise ValueError(f"a scale is given in the mode 'tensor' only, not in {mode!r}")
        step = scale.to(value.dtype).reshape(())
        return (value / step).clamp(-most, most).to(dtype), step.float()
    grouped = value
    if mode == "block":
        grouped = F.pad(value, (0, -columns % GROUP)).unflatten(-1, (-1, GROUP))
    if mode == "tensor":
        largest = value.abs().amax() if value.numel() else value.new_zeros(())
    else:
        largest = grouped.abs().amax(-1, keepdim=True)
    step = torch.where(largest == 0, torch.ones_like(largest), largest.clamp_min(SMALLEST) / most)
    q = (grouped / step).clamp(-most, most)
    if mode == "block":
        return q.flatten(-2)[..., :columns].contiguous().to(dtype), step.squeeze(-1).float()
    return q.to(dtype), step.float()


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def quantise_fp8(
    x: torch.Tensor,
    mode: str = "row",
    scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [..., D] as (fp8 [..., D], scale in fp32), ``fp8 * scale`` being near x.

    ``mode`` "row" gives scales [..., 1], "block" [..., ceil(D / 128)], "tensor" one number, which may be
    given. Where all of a row, group or tensor is zero, its scale is 1.
    """
    return scaled(_wide(x), mode, scale, dtype)


def silu_mul_fp8(
    gate: torch.Tensor,
    up: torch.Tensor,
    mode: str = "row",
    scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantise_fp8` of ``silu(gate) * up``."""
    return scaled(F.silu(_wide(gate)) * _wide(up), mode, scale, dtype)


def rms_norm_fp8(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    residual: torch.Tensor | None = None,
    mode: str = "row",
    scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, ...]:
    """`quantise_fp8` of ``rms_norm(x + residual)``; with a residual, x + residual is the third result."""
    total = x if residual is None else x + residual
    found = scaled(reference("rms_norm")(_wide(total), weight, eps, offset), mode, scale, dtype)
    return found if residual is None else (*found, total)


def layer_norm_fp8(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
    mode: str = "row",
    scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, ...]:
    """`quantise_fp8` of ``layer_norm(x + residual)``; with a residual, x + residual is the third result."""
    total = x if residual is None else x + residual
    found = scaled(reference("layer_norm")(_wide(total), weight, bias, eps), mode, scale, dtype)
    return found if residual is None else (*found, total)
