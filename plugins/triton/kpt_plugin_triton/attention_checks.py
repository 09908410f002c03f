"""What every form of attention refuses."""

from __future__ import annotations

import math
from typing import Any

import torch

from kpt_plugin_triton.checks import FLOATS, check_same_device, check_shape, check_tensor, refuse
from kpt_plugin_triton.registration import needs_grad

#: Features of one head that a tile still holds.
LARGEST_HEAD = 256


def check_heads(op: str, q: Any, k: Any, v: Any, dimensions: int) -> None:
    """q, k and v fit each other: (B, H, S, D) or, packed, (T, H, D); raises `KernelInputError` otherwise."""
    check_tensor(op, "q", q, FLOATS)
    for name, other in (("k", k), ("v", v)):
        check_tensor(op, name, other, (q.dtype,))
        check_same_device(op, name, other, q)
    layout = "(B, H, S, D)" if dimensions == 4 else "(T, H, D)"
    for name, value in (("q", q), ("k", k), ("v", v)):
        if value.dim() != dimensions:
            refuse(op, name, f"of {value.dim()} dimensions", f"{dimensions}, {layout}")
    if k.shape[-1] != q.shape[-1]:
        refuse(op, "k", f"of shape {tuple(k.shape)}", f"{q.shape[-1]} features, as q has")
    if dimensions == 4 and k.shape[0] != q.shape[0]:
        refuse(op, "k", f"of shape {tuple(k.shape)}", f"batch size {q.shape[0]}, as q has")
    check_shape(op, "v", v, (*k.shape[:-1], v.shape[-1]))
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        refuse(op, "q", f"of {q.shape[1]} heads", f"a multiple of the {k.shape[1]} heads of k")
    for name, value in (("q", q), ("v", v)):
        if not 1 <= value.shape[-1] <= LARGEST_HEAD:
            refuse(op, name, f"of {value.shape[-1]} features", f"1 to {LARGEST_HEAD}")


def check_scale(
    op: str, q: torch.Tensor, scale: float | None, softcap: float | None, sinks: torch.Tensor | None
) -> float:
    """The scale that is meant; raises `KernelInputError` for a scale, soft cap or sinks it does not take."""
    if scale is not None and not (isinstance(scale, float | int) and 0 < scale < math.inf):
        refuse(op, "scale", repr(scale), "a positive number")
    if softcap is not None and not (isinstance(softcap, float | int) and 0 < softcap < math.inf):
        refuse(op, "softcap", repr(softcap), "a positive number, or None")
    if sinks is not None:
        check_tensor(op, "sinks", sinks, FLOATS)
        check_shape(op, "sinks", sinks, q.shape[1:2])
        check_same_device(op, "sinks", sinks, q)
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def check_window(op: str, window: int | None) -> None:
    """``window`` is None or a number of keys; raises `KernelInputError` otherwise."""
    if window is not None and not (isinstance(window, int | torch.SymInt) and window >= 1):
        refuse(op, "window", repr(window), "a number of keys from 1 on, or None")


def check_mask(op: str, q: torch.Tensor, k: torch.Tensor, mask: Any) -> None:
    """``mask`` broadcasts to [B, H, queries, keys], without a gradient; else raises `KernelInputError`."""
    check_tensor(op, "mask", mask, (torch.bool, *FLOATS))
    check_same_device(op, "mask", mask, q)
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    sizes = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(sizes) != 4 or any(a not in (1, b) for a, b in zip(sizes, full)):
        refuse(op, "mask", f"of shape {tuple(mask.shape)}", f"what broadcasts to {full}")
    if needs_grad(mask):
        refuse(op, "mask", "in need of a gradient", "masks without one")
