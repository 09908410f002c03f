"""Rotations at the head sizes of common models; interleaved at two of them unless ``KPT_AOT_ALL=1``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch

from kpt_plugin_triton.qk_norm_rope import qk_norm_rope
from kpt_plugin_triton.rope import rope

#: Head size, and how much of it turns.
WIDTHS = ((64, 64), (80, 32), (96, 96), (128, 128), (128, 64), (256, 256))
INTERLEAVED = WIDTHS if os.environ.get("KPT_AOT_ALL") == "1" else ((80, 32), (128, 128))


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    for width, turning in WIDTHS:
        for interleaved in (False, True) if (width, turning) in INTERLEAVED else (False,):
            for normed in (False, True):
                name = f"{'qk_norm_rope' if normed else 'rope'} {turning} of {width}"
                if interleaved:
                    name += " interleaved"
                yield name, lambda w=width, t=turning, i=interleaved, n=normed: _run(w, t, i, n)


def _run(width: int, turning: int, interleaved: bool, normed: bool) -> None:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)

    q, k = empty(2, 2048, 32, width).transpose(1, 2), empty(2, 2048, 8, width).transpose(1, 2)
    cos, sin = empty(1, 2048, turning).detach(), empty(1, 2048, turning).detach()
    if normed:
        out = qk_norm_rope(q, k, empty(width), empty(width), cos, sin, interleaved=interleaved)
    else:
        out = rope(q, k, cos, sin, interleaved)
    torch.autograd.backward(out, [torch.empty_like(y) for y in out])
