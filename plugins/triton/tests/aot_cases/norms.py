"""Norms at the widths of common models."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from kpt_plugin_triton import norms


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    for columns in (128, 768, 4096, 5120, 8192, 16384, 40000):
        for op in ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm"):
            if columns in (768, 4096) or not op.startswith("add"):
                yield f"{op} {columns}", lambda op=op, columns=columns: _run(op, columns)


def _run(op: str, columns: int) -> None:
    x = torch.empty(1000, columns, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(columns, dtype=torch.bfloat16, device="meta", requires_grad=True)
    arguments = [x, torch.empty_like(x)] if op.startswith("add") else [x]
    arguments += [weight] if op.endswith("rms_norm") else [weight, torch.empty_like(weight)]
    out = getattr(norms, op)(*arguments)
    outputs = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
