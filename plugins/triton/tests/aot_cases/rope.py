"""Rotations at the head sizes of common models."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from kpt_plugin_triton.qk_norm_rope import qk_norm_rope
from kpt_plugin_triton.rope import rope

#: Head size, and how much of it turns.
WIDTHS = ((64, 64), (80, 32), (96, 96), (128, 128), (128, 64), (256, 256))
#: Where pairs that lie side by side are always compiled too.
INTERLEAVED = ((80, 32), (128, 128))


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    for width in WIDTHS:
        for interleaved in (False, True) if width in INTERLEAVED else (False,):
            yield from _both(width, interleaved, torch.bfloat16)


def more() -> Iterator[tuple[str, Callable[[], None]]]:
    for width in WIDTHS:
        if width not in INTERLEAVED:
            yield from _both(width, True, torch.bfloat16)
        for dtype in (torch.float16, torch.float32):
            for interleaved in (False, True):
                yield from _both(width, interleaved, dtype)


def _both(
    size: tuple[int, int], interleaved: bool, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], None]]]:
    """The rotation alone, and behind norms."""
    width, turning = size
    for op in ("rope", "qk_norm_rope"):
        name = f"{op} {turning} of {width} {dtype}{' interleaved' if interleaved else ''}"
        yield name, lambda normed=op != "rope": _run(width, turning, interleaved, normed, dtype)


def _run(width: int, turning: int, interleaved: bool, normed: bool, dtype: torch.dtype) -> None:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

    q, k = empty(2, 2048, 32, width).transpose(1, 2), empty(2, 2048, 8, width).transpose(1, 2)
    cos, sin = empty(1, 2048, turning).detach(), empty(1, 2048, turning).detach()
    if normed:
        out = qk_norm_rope(q, k, empty(width), empty(width), cos, sin, interleaved=interleaved)
    else:
        out = rope(q, k, cos, sin, interleaved)
    torch.autograd.backward(out, [torch.empty_like(y) for y in out])
