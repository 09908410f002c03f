"""Softmax and losses, with everything that adds to a kernel, at the sizes of common vocabularies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from kpt_plugin_triton import linear_losses, losses, softmax

#: Of 48 registers a thread: not for want of any. None on sm_90, where these options were measured.
SPILLS = {"cross_entropy without a gradient": 16}
#: The backward pass, outside of its loop over chunks: with one less in registers it is a tenth slower.
SPILLS_ON = {
    "sm_90": {
        f"softmax {n} torch.{d}": b for n in (65536, 73728) for d, b in (("bfloat16", 8), ("float16", 48))
    }
}
#: Sizes at which fp32 is always compiled too.
IN_BOTH = (1024, 65536, 1000, 50257)
ALWAYS = ("softmax 65536 torch.float16",)


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    for size, dtype, name, run in _all():
        both = dtype is torch.float32 and size in IN_BOTH and "linear" not in name
        if dtype is torch.bfloat16 or both or name in ALWAYS:
            yield name, run


def more() -> Iterator[tuple[str, Callable[[], None]]]:
    always = {name for name, _ in calls()}
    for _, _, name, run in _all():
        if name not in always:
            yield name, run


def _all() -> Iterator[tuple[int, torch.dtype, str, Callable[[], None]]]:
    """Size, dtype, name and call of everything."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for columns in (64, 1024, 4096, 8192, 16384, 32768, 57344, 65536, 73728, 106496):
            yield columns, dtype, f"softmax {columns} {dtype}", lambda c=columns, d=dtype: _softmax(c, d)
        for classes in (10, 1000, 4096, 16384, 32000, 50257, 128256, 256000):
            yield classes, dtype, f"cross_entropy {classes} {dtype}", lambda c=classes, d=dtype: _loss(c, d)
        for classes in (1000, 4096, 32000, 50257, 128256):
            name = f"cross_entropy without a gradient {classes} {dtype}"
            yield classes, dtype, name, lambda c=classes, d=dtype: _loss_alone(c, d)
        for classes in (1000, 16384, 50257, 128256):
            for weighed in (False, True):
                name = f"cross_entropy smoothed {classes} {dtype} {weighed}"
                yield classes, dtype, name, lambda c=classes, d=dtype, w=weighed: _smoothed(c, d, w)
        for options in ({}, {"softcap": 30.0}, {"reduction": "none", "z_loss": 1e-4, "softcap": 30.0}):
            for classes in (32000, 50257, 128256):
                name = f"linear_cross_entropy {classes} {dtype} {options}"
                yield classes, dtype, name, lambda c=classes, d=dtype, o=options: _linear(c, d, **o)


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def _backward(output: torch.Tensor) -> None:
    output.backward(torch.empty_like(output))


def _softmax(columns: int, dtype: torch.dtype) -> None:
    _backward(softmax.softmax(_empty(1000, columns, dtype=dtype)))


def _loss(classes: int, dtype: torch.dtype, **options: Any) -> None:
    target = _empty(8192, dtype=torch.int64)
    _backward(losses.cross_entropy(_empty(8192, classes, dtype=dtype), target, **options))


def _loss_alone(classes: int, dtype: torch.dtype) -> None:
    losses.cross_entropy(_empty(8192, classes, dtype=dtype).detach(), _empty(8192, dtype=torch.int64))


def _smoothed(classes: int, dtype: torch.dtype, weighed: bool) -> None:
    weight = _empty(classes, dtype=torch.float32).detach() if weighed else None
    _loss(classes, dtype, weight=weight, label_smoothing=0.1, z_loss=1e-4)


def _linear(classes: int, dtype: torch.dtype, **options: Any) -> None:
    target = _empty(8192, dtype=torch.int64)
    hidden, weight = _empty(8192, 4096, dtype=dtype), _empty(classes, 4096, dtype=dtype)
    _backward(linear_losses.linear_cross_entropy(hidden, weight, target, **options))
