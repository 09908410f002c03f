"""Which fp8 a GPU computes with, and how kernels get at types that a GPU cannot convert."""

from __future__ import annotations

import torch

from kpt_plugin_triton.launch import architecture

#: Four bits of exponent, as the Open Compute Project has it, and AMD's earlier one without a negative zero.
FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


def fp8_of(arch: str) -> torch.dtype:
    """The fp8 of an architecture's matrix units: e4m3fnuz on gfx94x, e4m3fn elsewhere."""
    return torch.float8_e4m3fnuz if arch.startswith("gfx94") else torch.float8_e4m3fn


def fp8_dtype(device: torch.device) -> torch.dtype:
    """As `fp8_of`, for a device."""
    return fp8_of(architecture(device.index if device.type != "cpu" else None))


def largest(dtype: torch.dtype) -> float:
    """The largest finite value of a float8 dtype, 448 or 240."""
    return float(torch.finfo(dtype).max)


def converts(arch: str, dtype: torch.dtype) -> bool:
    """Whether the architecture has instructions between ``dtype`` and wider types."""
    if arch.startswith("sm_"):
        return dtype == torch.float8_e4m3fn and int(arch[3:]) >= 89
    if arch.startswith("gfx94"):
        return dtype == torch.float8_e4m3fnuz
    return arch == "gfx950" and dtype == torch.float8_e4m3fn


def encoding(value: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(``value``, 0) where kernels may convert a float8 tensor, else (its bits as uint8, the bias).

    The bias is the exponent's, and kernels take it as BIAS: with 7 (e4m3fn) or 8 (e4m3fnuz) they use bits.
    """
    if converts(architecture(value.device.index), value.dtype):
        return value, 0
    return value.view(torch.uint8), 7 if value.dtype == torch.float8_e4m3fn else 8
