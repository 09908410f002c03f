"""Rotations of queries and keys, alone and behind a norm of each head.

Bytes: forward 2 passes over both; with backward 4, behind norms 5, as these read their inputs again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from gpu.case import Case
from gpu.inputs import held, random, step, widened

#: Batch, sequence, heads, key heads, features.
SIZES = ((4, 4096, 32, 8, 128), (8, 2048, 32, 32, 64))
EPS = 1e-6


def cases() -> Iterator[Case]:
    for number, size in enumerate(SIZES):
        for normed in (True, False):
            for backward in (False, True):
                yield _case(size, normed, backward, (2 if normed else 4) + 2 * number + backward)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def _rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    return _turned(q, cos, sin), _turned(k, cos, sin)


def _normed_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> Any:
    q, k = F.rms_norm(q, q.shape[-1:], a, EPS), F.rms_norm(k, k.shape[-1:], b, EPS)
    return _rope(q, k, cos, sin)


def _case(size: tuple[int, ...], normed: bool, backward: bool, rank: int) -> Case:
    batch, length, heads, key_heads, head = size
    plain = _normed_rope if normed else _rope

    def make() -> tuple[Any, ...]:
        q, k = random(batch, length, heads, head), random(batch, length, key_heads, head, factor=1.5)
        angles = random(1, length, head // 2, dtype=torch.float32).repeat(1, 1, 2)
        found = [x.transpose(1, 2).detach().requires_grad_(backward) for x in (q, k)]
        tables = [angles.cos().bfloat16(), angles.sin().bfloat16()]
        weights = [random(head).requires_grad_(backward), random(head).requires_grad_(backward)]
        return *found, *tables, *(weights if normed else [])

    inputs = held(make)

    def timed(function: Callable[..., Any]) -> Callable[[], Any]:
        return step(function, inputs(), _upstream(inputs()) if backward else None)

    def liger() -> Callable[[], Any]:
        from liger_kernel.ops.rope import LigerRopeFunction

        if normed:
            raise NotImplementedError("only its rope is compared")
        if backward:
            raise NotImplementedError("it writes over the gradients that come in")
        q, k, cos, sin = inputs()
        return lambda: LigerRopeFunction.apply(q, k, cos, sin)  # in place

    def kpt() -> Callable[[], Any]:
        from kpt_plugin_triton.qk_norm_rope import qk_norm_rope
        from kpt_plugin_triton.rope import rope

        if normed:
            return timed(lambda q, k, cos, sin, a, b: qk_norm_rope(q, k, a, b, cos, sin, EPS))
        return timed(rope)

    def reference() -> Any:
        wide = widened(inputs())
        upstream = [x.float() for x in _upstream(inputs())] if backward else None
        return step(plain, wide, upstream)()

    passes = (5 if normed else 4) if backward else 2
    return Case(
        op=("qk_norm_rope" if normed else "rope") + (" fwd+bwd" if backward else " fwd"),
        size=f"{batch}x{length}x{heads}({key_heads})x{head}",
        unit="GB/s",
        amount=passes * batch * length * (heads + key_heads) * head * 2,
        contenders={
            "eager": lambda: timed(plain),
            "torch.compile": lambda: timed(torch.compile(plain)),
            "liger": liger,
            "kpt": kpt,
        },
        reference=reference,
        ahead=("torch.compile", 1.3 if normed else 1.0),
        rank=rank,
        note="" if normed or backward else "liger rotates in place: only its first result is right",
    )


def _upstream(inputs: tuple[Any, ...]) -> list[torch.Tensor]:
    """Gradients that come in: other numbers than q and k, in their layout."""
    return [x.detach().flip(-1) for x in inputs[:2]]
