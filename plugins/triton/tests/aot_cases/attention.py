"""Attention in every form at the head sizes of common models, with gradients; decoding.

``KPT_AOT_ALL=1`` compiles every combination; by default those that differ most.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kpt_plugin_triton.attention import attention
from kpt_plugin_triton.block_sparse import attention_block_sparse
from kpt_plugin_triton.decode import decode_attention
from kpt_plugin_triton.varlen import attention_varlen

#: Kernels that have to use the matrix units.
DOTS = ("attention_forward", "attention_backward_keys", "attention_backward_queries", "decode_split")
ALL = os.environ.get("KPT_AOT_ALL") == "1"
HEADS = (64, 80, 96, 128, 192, 256) if ALL else (64, 128, 256)


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    for head in HEADS:
        yield f"causal {head}", lambda h=head: _dense(h, is_causal=True)
        if ALL or head == 128:
            yield f"plain {head}", lambda h=head: _dense(h)
            yield f"masked {head}", lambda h=head: _dense(h, mask=_empty(1, 1, 1, 1024, dtype=torch.bool))
            yield f"window {head}", lambda h=head: _dense(h, is_causal=True, window=256)
            yield f"packed {head}", lambda h=head: _packed(h)
            yield f"blocks {head}", lambda h=head: _blocks(h)
        if ALL:
            yield f"soft cap and sinks {head}", lambda h=head: _dense(h, softcap=30.0, sinks=_empty(8))
            yield f"biased {head}", lambda h=head: _dense(h, mask=_empty(1, 8, 1024, 1024))
        if ALL or head in (64, 128):
            yield f"decode {head}", lambda h=head: _decode(h, 32)
    yield "decode, every head its keys", lambda: _decode(128, 8)


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _heads(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [_empty(*shape).requires_grad_() for shape in shapes]


def _with_gradients(out: torch.Tensor) -> None:
    out.backward(torch.empty_like(out))


def _dense(head: int, **how: Any) -> None:
    q, k, v = _heads((2, 8, 1024, head), (2, 2, 1024, head), (2, 2, 1024, head))
    _with_gradients(attention(q, k, v, **how))


def _packed(head: int) -> None:
    q, k, v = _heads((1000, 8, head), (1000, 2, head), (1000, 2, head))
    ends = _empty(5, dtype=torch.int32)
    _with_gradients(attention_varlen(q, k, v, ends, ends, 400, 400, is_causal=True))


def _blocks(head: int) -> None:
    q, k, v = _heads((2, 8, 1024, head), (2, 2, 1024, head), (2, 2, 1024, head))
    _with_gradients(attention_block_sparse(q, k, v, _empty(1, 1, 8, 8, dtype=torch.bool), is_causal=True))


def _decode(head: int, heads: int) -> None:
    q, k, v = _empty(1, heads, 1, head), _empty(1, 8, 32768, head), _empty(1, 8, 32768, head)
    decode_attention(q, k, v, _empty(1, dtype=torch.int32))
