"""SwiGLU's activation and bias + activation.

Bytes: forward 3 passes, with backward 8 (gate, up and dy are read again, two gradients written); bias +
activation 2 and 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from gpu.case import Case
from gpu.inputs import held, random, step, widened

SIZES = ((16384, 14336), (4096, 8192))
BIASED = ((16384, 3072),)


def cases() -> Iterator[Case]:
    for number, (rows, columns) in enumerate(SIZES):
        for backward in (False, True):
            yield _swiglu(rows, columns, backward, 2 + 2 * number)
    for rows, columns in BIASED:
        for backward in (False, True):
            yield _biased(rows, columns, backward)


def _plain(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def _plain_biased(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.gelu(x + bias)


def _swiglu(rows: int, columns: int, backward: bool, rank: int) -> Case:
    inputs = held(lambda: tuple(x.clone().requires_grad_(backward) for x in random(2, rows, columns)))

    def liger() -> Callable[..., torch.Tensor]:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply  # type: ignore[no-any-return]

    def kpt() -> Callable[..., torch.Tensor]:
        from kpt_plugin_triton.glu import glu

        return glu

    amount = rows * columns * 2 * (8 if backward else 3)
    return _case(
        "swiglu", inputs, _plain, {"liger": liger, "kpt": kpt}, (rows, columns), amount, backward, rank
    )


def _biased(rows: int, columns: int, backward: bool) -> Case:
    def make() -> tuple[Any, ...]:
        return random(rows, columns).requires_grad_(backward), random(columns).requires_grad_(backward)

    def kpt() -> Callable[..., torch.Tensor]:
        from kpt_plugin_triton.activations import bias_activation

        return bias_activation

    amount = rows * columns * 2 * (5 if backward else 2)
    return _case("bias + gelu", held(make), _plain_biased, {"kpt": kpt}, (rows, columns), amount, backward, 7)


def _case(
    op: str,
    inputs: Callable[[], tuple[Any, ...]],
    plain: Callable[..., torch.Tensor],
    peers: dict[str, Callable[[], Callable[..., torch.Tensor]]],
    size: tuple[int, int],
    amount: float,
    backward: bool,
    rank: int,
) -> Case:
    upstream = held(lambda: (random(*size, factor=0.5),))

    def timed(function: Callable[..., Any]) -> Callable[[], Any]:
        return step(function, inputs(), upstream() if backward else None)

    def reference() -> Any:
        return step(plain, widened(inputs()), [x.float() for x in upstream()] if backward else None)()

    return Case(
        op=op + (" fwd+bwd" if backward else " fwd"),
        size=f"{size[0]}x{size[1]}",
        unit="GB/s",
        amount=amount,
        contenders={
            "eager": lambda: timed(plain),
            "torch.compile": lambda: timed(torch.compile(plain)),
            **{name: (lambda peer=peer: timed(peer())) for name, peer in peers.items()},
        },
        reference=reference,
        ahead=("torch.compile", 1.0),
        rank=rank,
    )
