"""Norms at the widths of common models."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from kpt_plugin_triton import norms

COLUMNS = (128, 768, 4096, 5120, 8192, 16384, 40000)
OPS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    for columns in COLUMNS:
        for op in OPS:
            if columns in (768, 4096) or not op.startswith("add"):
                yield f"{op} {columns}", lambda op=op, columns=columns: _run(op, columns)


def more() -> Iterator[tuple[str, Callable[[], None]]]:
    for dtype in (torch.float16, torch.float32):
        for columns in COLUMNS:
            for op in OPS:
                yield f"{op} {columns} {dtype}", lambda op=op, c=columns, d=dtype: _run(op, c, d)


def _run(op: str, columns: int, dtype: torch.dtype = torch.bfloat16) -> None:
    x = torch.empty(1000, columns, dtype=dtype, device="meta", requires_grad=True)
    weight = torch.empty(columns, dtype=dtype, device="meta", requires_grad=True)
    arguments = [x, torch.empty_like(x)] if op.startswith("add") else [x]
    arguments += [weight] if op.endswith("rms_norm") else [weight, torch.empty_like(weight)]
    out = getattr(norms, op)(*arguments)
    outputs = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
