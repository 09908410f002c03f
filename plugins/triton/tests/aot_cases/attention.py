"""Attention in every form at the head sizes of common models, with gradients; decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from kpt_plugin_triton.attention import attention
from kpt_plugin_triton.block_sparse import attention_block_sparse
from kpt_plugin_triton.decode import decode_attention
from kpt_plugin_triton.varlen import attention_varlen

#: Kernels that have to use the matrix units.
DOTS = (
    "attention_forward",
    "attention_forward_hopper",
    "attention_backward_keys",
    "attention_backward_queries",
    "decode_split",
)
#: Three of the head sizes differ in their blocks; the others are padded to one of them.
HEADS = (64, 128, 256)
PADDED = (80, 96, 192)
#: Known to spill. A bias is a second tile of scores, and has the block sizes of masks of booleans; a soft cap
#: has those that were measured without one. On sm_90 the tiles of the others are a few registers short
#: outside of their loops, and were a sixth faster on an H200 than the fastest that do not spill.
SPILLS = {
    "biased 128": 192,
    "soft cap and sinks 128": 32,
    "causal 128": 48,
    "plain 128": 32,
    "packed 128": 56,
    "blocks 128": 104,
}
HALF, SINGLE = torch.float16, torch.float32


def small(kernel: str, constants: Mapping[str, Any]) -> str | None:
    """Why a kernel's tiles have fewer rows than wgmma and tcgen05 multiply, where that is right."""
    if kernel == "decode_split":
        return "the queries that share a head of keys are 16 rows at most"
    if kernel.startswith("attention_backward") and constants["BLOCK_D"] > 128:
        return "64 rows of 256 features, and as many of their gradients, do not fit the registers"
    return None


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    """The forms that differ most."""
    for head in HEADS:
        yield f"causal {head}", lambda h=head: _dense(h, is_causal=True)
    yield from _forms(128, torch.bfloat16)
    for head in (64, 128):
        yield f"decode {head}", lambda h=head: _decode(h, 32)
    yield "decode, every head its keys", lambda: _decode(128, 8)
    yield "causal 128 float16", lambda: _dense(128, HALF, is_causal=True)


def more() -> Iterator[tuple[str, Callable[[], None]]]:
    """Every form at every head size, in bf16 and fp16, and in fp32 at those that differ."""
    for dtype, heads in (
        (torch.bfloat16, (64, 256, *PADDED)),
        (HALF, (*HEADS, *PADDED)),
        (SINGLE, HEADS),
    ):
        for head in heads:
            yield f"causal {head} {dtype}", lambda h=head, d=dtype: _dense(h, d, is_causal=True)
            yield f"decode {head} {dtype}", lambda h=head, d=dtype: _decode(h, 32, d)
            yield from _forms(head, dtype)


def _forms(head: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every form but the causal one."""
    how: dict[str, Callable[[], dict[str, Any]]] = {
        "plain": dict,
        "masked": lambda: {"mask": _empty(1, 1, 1, 1024, dtype=torch.bool)},
        "window": lambda: {"is_causal": True, "window": 256},
        "soft cap and sinks": lambda: {"softcap": 30.0, "sinks": _empty(8, dtype=dtype)},
        "biased": lambda: {"mask": _empty(1, 8, 1024, 1024, dtype=dtype)},
    }
    for name, arguments in how.items():
        yield f"{name} {head} {dtype}", lambda arguments=arguments: _dense(head, dtype, **arguments())
    yield f"packed {head} {dtype}", lambda: _packed(head, dtype)
    yield f"blocks {head} {dtype}", lambda: _blocks(head, dtype)


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _heads(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [_empty(*shape, dtype=dtype).requires_grad_() for shape in shapes]


def _with_gradients(out: torch.Tensor) -> None:
    out.backward(torch.empty_like(out))


def _dense(head: int, dtype: torch.dtype = torch.bfloat16, **how: Any) -> None:
    q, k, v = _heads(dtype, (2, 8, 1024, head), (2, 2, 1024, head), (2, 2, 1024, head))
    _with_gradients(attention(q, k, v, **how))


def _packed(head: int, dtype: torch.dtype) -> None:
    q, k, v = _heads(dtype, (1000, 8, head), (1000, 2, head), (1000, 2, head))
    ends = _empty(5, dtype=torch.int32)
    _with_gradients(attention_varlen(q, k, v, ends, ends, 400, 400, is_causal=True))


def _blocks(head: int, dtype: torch.dtype) -> None:
    q, k, v = _heads(dtype, (2, 8, 1024, head), (2, 2, 1024, head), (2, 2, 1024, head))
    _with_gradients(attention_block_sparse(q, k, v, _empty(1, 1, 8, 8, dtype=torch.bool), is_causal=True))


def _decode(head: int, heads: int, dtype: torch.dtype = torch.bfloat16) -> None:
    q = _empty(1, heads, 1, head, dtype=dtype)
    k, v = (_empty(1, 8, 32768, head, dtype=dtype) for _ in range(2))
    decode_attention(q, k, v, _empty(1, dtype=torch.int32))
