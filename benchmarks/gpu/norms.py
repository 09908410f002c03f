"""rms_norm, layer_norm and their sums with a residual; bytes: forward 2 passes over x, with backward 5."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from gpu.case import Case
from gpu.inputs import held, random, step, widened

GOALS = {
    ("rms_norm", 16384, 4096): (4000, 3500),
    ("rms_norm", 16384, 8192): (4000, 3600),
    ("rms_norm", 4096, 4096): (None, 2200),
    ("layer_norm", 16384, 4096): (3900, 3400),
    ("layer_norm", 16384, 8192): (3900, 3400),
}
SIZES = ((16384, 1024), (4096, 4096), (16384, 4096), (16384, 5120), (16384, 8192), (4096, 16384))


def cases() -> Iterator[Case]:
    for op in ("rms_norm", "layer_norm"):
        for rows, columns in SIZES:
            forward, both = GOALS.get((op, rows, columns), (None, None))
            yield _case(op, rows, columns, False, forward)
            yield _case(op, rows, columns, True, both)


def _case(op: str, rows: int, columns: int, backward: bool, goal: float | None) -> Case:
    weights = 1 if op == "rms_norm" else 2

    def make() -> tuple[Any, ...]:
        drawn = random(rows, columns), *(x for x in random(2, columns)[:weights])
        return tuple(x.clone().requires_grad_(backward) for x in drawn)

    inputs = held(make)
    upstream = held(lambda: (random(rows, columns, factor=0.5),))

    def with_backward(function: Callable[..., torch.Tensor]) -> Callable[[], Any]:
        return step(function, inputs(), upstream() if backward else None)

    def eager() -> Callable[[], Any]:
        return with_backward(_plain(op, columns))

    def compiled() -> Callable[[], Any]:
        return with_backward(torch.compile(_plain(op, columns)))

    def kpt() -> Callable[[], Any]:
        from kpt_plugin_triton import norms
        from kpt_plugin_triton.native import norms as native

        native.wait()  # compiled in the background otherwise: the first calls would be launched from Python
        return with_backward(getattr(norms, op))

    def liger() -> Callable[[], Any]:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        if op == "rms_norm":
            return with_backward(lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False))
        return with_backward(lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, 1e-5))

    def quack() -> Callable[[], Any]:
        from quack import rmsnorm

        if op != "rms_norm":
            raise NotImplementedError("only its rms_norm is compared")
        return with_backward(lambda x, w: rmsnorm(x, w, eps=1e-6))

    def reference() -> Any:
        above = [x.float() for x in upstream()] if backward else None
        return step(_plain(op, columns), widened(inputs()), above)()

    return Case(
        op=op + (" fwd+bwd" if backward else " fwd"),
        size=f"{rows}x{columns}",
        unit="GB/s",
        amount=rows * columns * 2 * (5 if backward else 2),
        contenders={"eager": eager, "torch.compile": compiled, "liger": liger, "quack": quack, "kpt": kpt},
        reference=reference,
        goal=goal,
        rank=(2 if backward else 3) if goal is not None else 7,
    )


def _plain(op: str, columns: int) -> Callable[..., torch.Tensor]:
    if op == "rms_norm":
        return lambda x, w: F.rms_norm(x, (columns,), w, 1e-6)
    return lambda x, w, b: F.layer_norm(x, (columns,), w, b, 1e-5)
