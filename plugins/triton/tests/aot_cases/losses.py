"""Softmax and losses, with everything that adds to a kernel, at the sizes of common vocabularies.

In fp32 at some of the sizes only, unless ``KPT_AOT_ALL=1``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kpt_plugin_triton import linear_losses, losses, softmax

HALF, BOTH = (torch.bfloat16,), (torch.bfloat16, torch.float32)
IN_BOTH = (1024, 65536, 1000, 50257)


def _dtypes(size: int) -> tuple[torch.dtype, ...]:
    return BOTH if size in IN_BOTH or os.environ.get("KPT_AOT_ALL") == "1" else HALF


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    for columns in (64, 1024, 4096, 8192, 16384, 32768, 65536):
        for dtype in _dtypes(columns):
            yield f"softmax {columns} {dtype}", lambda c=columns, d=dtype: _softmax(c, d)
    for classes in (10, 1000, 4096, 16384, 32000, 50257, 128256, 256000):
        for dtype in _dtypes(classes):
            yield f"cross_entropy {classes} {dtype}", lambda c=classes, d=dtype: _loss(c, d)
    for classes in (1000, 16384, 50257, 128256):
        for dtype in _dtypes(classes):
            for weighed in (False, True):
                yield (
                    f"cross_entropy smoothed {classes} {dtype} {weighed}",
                    lambda c=classes, d=dtype, w=weighed: _smoothed(c, d, w),
                )
    for options in ({}, {"softcap": 30.0}, {"reduction": "none", "z_loss": 1e-4, "softcap": 30.0}):
        for classes in (32000, 50257, 128256):
            yield (
                f"linear_cross_entropy {classes} {options}",
                lambda c=classes, o=options: _linear(c, **o),
            )


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def _backward(output: torch.Tensor) -> None:
    output.backward(torch.empty_like(output))


def _softmax(columns: int, dtype: torch.dtype) -> None:
    _backward(softmax.softmax(_empty(1000, columns, dtype=dtype)))


def _loss(classes: int, dtype: torch.dtype, **options: Any) -> None:
    target = _empty(8192, dtype=torch.int64)
    _backward(losses.cross_entropy(_empty(8192, classes, dtype=dtype), target, **options))


def _smoothed(classes: int, dtype: torch.dtype, weighed: bool) -> None:
    weight = _empty(classes, dtype=torch.float32).detach() if weighed else None
    _loss(classes, dtype, weight=weight, label_smoothing=0.1, z_loss=1e-4)


def _linear(classes: int, **options: Any) -> None:
    target = _empty(8192, dtype=torch.int64)
    _backward(
        linear_losses.linear_cross_entropy(_empty(8192, 4096), _empty(classes, 4096), target, **options)
    )
