"""rms_norm, layer_norm and their sums with a residual; bytes: forward 2 passes over x, with backward 5."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from gpu.case import Case

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
    held: dict[str, Any] = {}

    def inputs() -> tuple[torch.Tensor, ...]:
        if not held:
            generator = torch.Generator("cuda").manual_seed(0)
            made = [torch.randn(rows, columns, generator=generator, device="cuda", dtype=torch.bfloat16)]
            weights = 1 if op == "rms_norm" else 2
            for _ in range(weights):
                made.append(torch.randn(columns, generator=generator, device="cuda", dtype=torch.bfloat16))
            held["inputs"] = [value.requires_grad_(backward) for value in made]
            held["dy"] = torch.randn_like(made[0])
        return tuple(held["inputs"])

    def with_backward(function: Callable[..., torch.Tensor]) -> Callable[[], Any]:
        arguments = inputs()
        if not backward:
            return lambda: function(*arguments)

        def call() -> Any:
            return torch.autograd.grad(function(*arguments), arguments, held["dy"])

        return call

    def eager() -> Callable[[], Any]:
        return with_backward(_plain(op, columns))

    def compiled() -> Callable[[], Any]:
        return with_backward(torch.compile(_plain(op, columns)))

    def kpt() -> Callable[[], Any]:
        from kpt_plugin_triton import norms

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
        arguments = [value.detach().float().requires_grad_(backward) for value in inputs()]
        out = _plain(op, columns)(*arguments)
        return torch.autograd.grad(out, arguments, held["dy"].float()) if backward else out

    return Case(
        op=op + (" fwd+bwd" if backward else " fwd"),
        size=f"{rows}x{columns}",
        unit="GB/s",
        amount=rows * columns * 2 * (5 if backward else 2),
        contenders={"eager": eager, "torch.compile": compiled, "liger": liger, "quack": quack, "kpt": kpt},
        reference=reference,
        goal=goal,
    )


def _plain(op: str, columns: int) -> Callable[..., torch.Tensor]:
    if op == "rms_norm":
        return lambda x, w: F.rms_norm(x, (columns,), w, 1e-6)
    return lambda x, w, b: F.layer_norm(x, (columns,), w, b, 1e-5)
