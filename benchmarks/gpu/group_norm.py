"""group_norm with silu, as image models have it, and a normalised sum of embeddings.

Bytes: forward 2 passes over x, with backward 5. Embeddings: the sum's rows are written, a row of the table of
words read for each; the other tables stay in the caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from gpu.case import Case
from gpu.inputs import held, integers, random, step, widened

#: Batch, channels, height, width.
SIZES = ((8, 320, 64, 64), (8, 1280, 16, 16), (2, 128, 512, 512))
GROUPS = 32


def cases() -> Iterator[Case]:
    for number, size in enumerate(SIZES):
        for last in (False, True):
            for backward in (False, True):
                yield _case(size, last, backward, 6 if number == 0 else 9)
    yield _embedding(64, 512, 768)


def _plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias))


def _case(size: tuple[int, ...], last: bool, backward: bool, rank: int) -> Case:
    layout = torch.channels_last if last else torch.contiguous_format

    def make() -> tuple[Any, ...]:
        x = random(*size).contiguous(memory_format=layout).requires_grad_(backward)
        return x, *(random(size[1], factor=f).requires_grad_(backward) for f in (1.0, 0.5))

    inputs = held(make)
    upstream = held(lambda: (random(*size, factor=0.5).contiguous(memory_format=layout),))

    def timed(function: Callable[..., Any]) -> Callable[[], Any]:
        return step(function, inputs(), upstream() if backward else None)

    def kpt() -> Callable[[], Any]:
        from kpt_plugin_triton.group_norm import group_norm

        return timed(lambda x, weight, bias: group_norm(x, GROUPS, weight, bias, activation="silu"))

    def reference() -> Any:
        return step(_plain, widened(inputs()), [x.float() for x in upstream()] if backward else None)()

    numbers = 1
    for part in size:
        numbers *= part
    return Case(
        op="group_norm + silu" + (" fwd+bwd" if backward else " fwd"),
        size="x".join(map(str, size)) + (" channels last" if last else ""),
        unit="GB/s",
        amount=numbers * 2 * (5 if backward else 2),
        contenders={
            "eager": lambda: timed(_plain),
            "torch.compile": lambda: timed(torch.compile(_plain)),
            "kpt": kpt,
        },
        reference=reference,
        rank=rank,
    )


def _plain_embedding(
    ids: torch.Tensor,
    words: torch.Tensor,
    places: torch.Tensor,
    positions: torch.Tensor,
    kinds: torch.Tensor,
    types: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    total = F.embedding(ids, words) + F.embedding(kinds, types) + F.embedding(places, positions)
    return F.layer_norm(total, words.shape[1:], weight, bias, 1e-12)


def _embedding(batch: int, length: int, columns: int) -> Case:
    def make() -> tuple[Any, ...]:
        tables = [random(size, columns) for size in (30522, length, 2)]
        ids = integers(30522, batch, length)
        places = torch.arange(length, device=ids.device)[None]
        affine = random(columns), random(columns, factor=0.5)
        return ids, tables[0], places, tables[1], ids % 2, tables[2], *affine

    inputs = held(make)

    def kpt() -> Callable[[], Any]:
        from kpt_plugin_triton.embedding import embedding_sum_norm

        return step(embedding_sum_norm, inputs())

    return Case(
        op="embedding_sum_norm fwd",
        size=f"{batch}x{length}x{columns}",
        unit="GB/s",
        amount=batch * length * (columns * 2 * 2 + 8),
        contenders={
            "eager": lambda: step(_plain_embedding, inputs()),
            "torch.compile": lambda: step(torch.compile(_plain_embedding), inputs()),
            "kpt": kpt,
        },
        reference=lambda: step(_plain_embedding, widened(inputs()))(),
        rank=6,
    )
