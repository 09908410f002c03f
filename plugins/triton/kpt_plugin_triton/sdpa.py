"""attention by cuDNN, through PyTorch: the fastest for plain and causal attention on Hopper."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kpt_plugin_triton.checks import check_tensor, refuse

if TYPE_CHECKING:
    from kpt.ops.sites import Site

_HALVES = (torch.bfloat16, torch.float16)
_LARGEST_HEAD = 128


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """`scaled_dot_product_attention` held to the cuDNN backend; arguments as for the op's reference.

    cuDNN makes a plan for every new shape, which takes tens of milliseconds.

    Raises:
        KernelInputError: ``softcap``, ``sinks`` or ``window`` is given, a dtype is not bf16 or fp16, or a
            mask comes with ``is_causal``.
    """
    check_tensor("attention/sdpa-cudnn", "q", q, _HALVES)
    for name, value in (("softcap", softcap), ("sinks", sinks), ("window", window)):
        if value is not None:
            refuse("attention/sdpa-cudnn", name, "given", "None; attention/triton has it")
    if mask is not None and is_causal:
        refuse("attention/sdpa-cudnn", "mask", "given with is_causal", "either, not both")
    if mask is not None and mask.dtype not in (torch.bool, q.dtype):
        refuse("attention/sdpa-cudnn", "mask", str(mask.dtype), f"torch.bool or {q.dtype}")
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )


def supports(site: Site) -> str | None:
    """The reason why a site cannot be served by cuDNN, or None."""
    from kpt_plugin_triton.sites import on_gpu, seen

    refusal = on_gpu(site)
    if refusal is not None:
        return refusal
    if torch.version.hip is not None:
        return "cuDNN is there on NVIDIA GPUs only"
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9:
        return "cuDNN's attention is the fastest from compute capability 9.0 on; this GPU is older"
    given = site.binding.arguments
    for name in ("softcap", "sinks", "window"):
        if name in given:
            return f"the site has {name}, which cuDNN's attention as PyTorch calls it has not"
    if "mask" in given:
        # a row whose keys are all masked has no defined result there, and zeros here
        return "the site has a mask: rows without any key are zeros here, and undefined in cuDNN"
    for name in ("q", "k", "v"):
        for shape, dtype in seen(site, name):
            if len(shape) == 4 and (shape[-1] > _LARGEST_HEAD or shape[-1] % 8):
                return f"{name} has {shape[-1]} features; cuDNN takes multiples of 8 up to {_LARGEST_HEAD}"
            if dtype == "float32":
                return "the site is in float32; cuDNN's attention takes bfloat16 and float16"
    return None
