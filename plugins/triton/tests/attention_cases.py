"""Attention in all its forms against fp64, shared by the tests of values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from triton_suite import TritonSuite

from kpt.ops import reference
from kpt_plugin_triton import attention_backward, attention_forward
from kpt_plugin_triton.attention import attention

DEVICE = TritonSuite.device
#: Errors relative to the largest value that fp32 and fp16 may have.
TOLERANCES = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def heads(
    batch: int = 1,
    queries: int = 2,
    keys: int = 1,
    q_len: int = 37,
    k_len: int = 37,
    head: int = 16,
    head_v: int = 16,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v as projections give them: [B, S, H, D] seen as [B, H, S, D]."""
    sizes = ((q_len, queries, head), (k_len, keys, head), (k_len, keys, head_v))
    q, k, v = (randn(batch, *size, seed=n, dtype=dtype).transpose(1, 2) for n, size in enumerate(sizes))
    return q, k, v


def compare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    run: Callable[..., torch.Tensor] = attention,
    plain: Callable[..., torch.Tensor] | None = None,
    **how: Any,
) -> torch.Tensor:
    """Values and gradients of ``run`` against ``plain`` (the op's reference) in fp64; returns the values.

    ``sinks`` is given as the seed that they are drawn with.
    """
    if "sinks" in how:
        how["sinks"] = randn(q.shape[1], seed=how["sinks"])
    leaves = {"q": q, "k": k, "v": v, **({"sinks": how.pop("sinks")} if "sinks" in how else {})}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    out = run(**leaves, **how)
    upstream = randn(*out.shape, seed=9, dtype=out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), upstream)
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    also = {n: x.double() if _is_float(x) else x for n, x in how.items()}
    # Sinks too small to count: a row without keys then has gradients in the reference that are no NaN.
    blind = {"sinks": torch.full((q.shape[1],), -1e4, dtype=torch.float64, device=q.device)}
    true = (plain or reference("attention"))(**{**blind, **wide, **also})
    expected = torch.autograd.grad(true, list(wide.values()), upstream.double())
    for name, mine, right in zip(("out", *leaves), (out, *grads), (true, *expected)):
        # where nothing but rounding is right (a single key has no gradient), it may be as large as one
        error = (mine.double() - right).abs().max() / right.abs().max().clamp_min(1.0)
        assert mine.shape == right.shape and float(error) < TOLERANCES[q.dtype], f"{name}: {float(error):.1e}"
    with torch.no_grad():
        assert torch.equal(run(**leaves, **how), out), "without gradients other bits come out"
    return out.detach()


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def with_options(monkeypatch: Any, **options: int) -> None:
    """All three kernels with these options, as an architecture with other limits would have them."""
    forward = {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2, **options}
    monkeypatch.setattr(attention_forward, "forward_options", lambda *sizes: forward)
    backward = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2, **options}
    monkeypatch.setattr(attention_backward, "keys_options", lambda *sizes: backward)
    monkeypatch.setattr(attention_backward, "queries_options", lambda *sizes: backward)
