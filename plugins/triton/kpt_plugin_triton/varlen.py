"""Attention over packed sequences of different lengths."""

from __future__ import annotations

import torch

from kpt_plugin_triton.attention import call
from kpt_plugin_triton.attention_checks import check_heads, check_scale, check_window
from kpt_plugin_triton.attention_forward import How
from kpt_plugin_triton.checks import check_same_device, check_tensor, refuse


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """`attention` within B packed sequences: ``q`` (T, H, D), ``k`` (Tk, Hkv, D), ``v`` (Tk, Hkv, Dv).

    Sequence i has the rows ``cu_seqlens_q[i]`` to ``cu_seqlens_q[i + 1]`` of ``q`` and the same of ``k`` and
    ``v`` by ``cu_seqlens_k``: int32 or int64, (B + 1,), rising from 0 to T (Tk), which is not checked, as it
    would wait for the device. ``max_q`` and ``max_k`` are at least the longest lengths. ``is_causal`` and
    ``window`` count from each sequence's own start. Other arguments, dtypes, gradients as for `attention`.

    Raises:
        KernelInputError: an argument's device, dtype, shape or value is not supported.
    """
    name = "attention_varlen"
    check_heads(name, q, k, v, 3)
    for label, starts in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_tensor(name, label, starts, (torch.int32, torch.int64))
        check_same_device(name, label, starts, q)
        if starts.dim() != 1 or starts.shape[0] < 1:
            refuse(name, label, f"of shape {tuple(starts.shape)}", "(sequences + 1,)")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        refuse(name, "cu_seqlens_k", f"of shape {tuple(cu_seqlens_k.shape)}", f"{tuple(cu_seqlens_q.shape)}")
    for label, longest, total in (("max_q", max_q, q.shape[0]), ("max_k", max_k, k.shape[0])):
        if longest < 0 or (longest == 0 and total > 0):
            refuse(name, label, str(longest), "at least the longest sequence's length")
    check_window(name, window)
    how = How(is_causal, window, check_scale(name, q, scale, softcap, sinks), softcap)
    starts = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())
    return call(q, k, v, sinks, how, starts=starts, longest=(max_q, max_k))
