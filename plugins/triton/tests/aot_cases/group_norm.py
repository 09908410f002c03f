"""group_norm at the sizes of image models, and a sum of embeddings that is normalised."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from kpt_plugin_triton.embedding import embedding_sum_norm
from kpt_plugin_triton.group_norm import group_norm

#: Batch, channels, height and width.
SIZES = ((2, 320, 64, 64), (2, 1280, 8, 8), (2, 640, 16, 16), (1, 128, 512, 512), (8, 2560, 32, 32))


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    yield from _in(torch.bfloat16)


def more() -> Iterator[tuple[str, Callable[[], None]]]:
    for dtype in (torch.float16, torch.float32):
        yield from _in(dtype)


def _in(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    for size in SIZES:
        for last in (False, True):
            name = f"group_norm {size} {dtype}{' channels last' if last else ''}"
            yield name, lambda s=size, c=last: _run(s, c, dtype)
    for columns in (128, 768, 1024, 4096, 16384):
        yield f"embedding_sum_norm {columns} {dtype}", lambda c=columns: _embed(c, dtype)


def _run(size: tuple[int, ...], last: bool, dtype: torch.dtype) -> None:
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(size, dtype=dtype, device="meta", memory_format=layout, requires_grad=True)
    weight = torch.empty(size[1], dtype=dtype, device="meta", requires_grad=True)
    for activation in (None, "silu"):
        y = group_norm(x, 32, weight, torch.empty_like(weight), activation=activation)
        y.backward(torch.empty_like(y))


def _embed(columns: int, dtype: torch.dtype) -> None:
    def numbers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64, device="meta")

    words, positions, types = (
        torch.empty(size, columns, dtype=dtype, device="meta") for size in (30522, 512, 2)
    )
    weight = torch.empty(columns, dtype=dtype, device="meta", requires_grad=True)
    first, second = numbers(8, 512), numbers(1, 512)
    y = embedding_sum_norm(first, words, second, positions, first, types, weight, torch.empty_like(weight))
    y.backward(torch.empty_like(y))
