"""Norms and SwiGLU whose result is quantised to fp8 (e4m3) in the same pass.

Bytes: inputs read once, fp8 and scales written once; a scale for the whole tensor needs its inputs twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from gpu.case import Case
from gpu.inputs import held, random, step, widened

ROWS, COLUMNS, INNER = 16384, 4096, 14336
GROUP, LARGEST = 128, 448.0
FP8 = torch.float8_e4m3fn


def cases() -> Iterator[Case]:
    yield _case("rms_norm_fp8", "row", 1)
    yield _case("rms_norm_fp8", "block", 2)
    yield _case("rms_norm_fp8", "tensor", 4)
    yield _case("add_rms_norm_fp8", "row", 3)
    yield _case("silu_mul_fp8", "row", 3)
    yield _case("silu_mul_fp8", "block", 5)
    yield _case("quantise_fp8", "row", 6)


def _scaled(y: torch.Tensor, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    y = y.float()
    if mode == "block":
        grouped = y.unflatten(-1, (-1, GROUP))
        scale = grouped.abs().amax(-1).clamp_min(1e-12) / LARGEST
        return (grouped / scale[..., None]).clamp(-LARGEST, LARGEST).flatten(-2).to(FP8), scale
    most = y.abs().amax(-1, keepdim=True) if mode == "row" else y.abs().amax()
    scale = most.clamp_min(1e-12) / LARGEST
    return (y / scale).clamp(-LARGEST, LARGEST).to(FP8), scale


def _plain(op: str, mode: str) -> Callable[..., Any]:
    def norm(x: torch.Tensor, weight: torch.Tensor) -> Any:
        return _scaled(F.rms_norm(x.float(), x.shape[-1:], weight.float(), 1e-6), mode)

    def add_norm(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> Any:
        total = x + residual
        return *norm(total, weight), total

    def gated(gate: torch.Tensor, up: torch.Tensor) -> Any:
        return _scaled(F.silu(gate.float()) * up.float(), mode)

    def alone(x: torch.Tensor) -> Any:
        return _scaled(x, mode)

    return {
        "rms_norm_fp8": norm,
        "add_rms_norm_fp8": add_norm,
        "silu_mul_fp8": gated,
        "quantise_fp8": alone,
    }[op]


def _own(op: str, mode: str) -> Callable[..., Any]:
    from kpt_plugin_triton.norms_fp8 import rms_norm_fp8
    from kpt_plugin_triton.quantise import quantise_fp8, silu_mul_fp8

    return {
        "rms_norm_fp8": lambda x, weight: rms_norm_fp8(x, weight, mode=mode),
        "add_rms_norm_fp8": lambda x, weight, residual: rms_norm_fp8(x, weight, residual=residual, mode=mode),
        "silu_mul_fp8": lambda gate, up: silu_mul_fp8(gate, up, mode),
        "quantise_fp8": lambda x: quantise_fp8(x, mode),
    }[op]


def _case(op: str, mode: str, rank: int) -> Case:
    gated = op == "silu_mul_fp8"
    columns = INNER if gated else COLUMNS

    def make() -> tuple[Any, ...]:
        first, second = random(2, ROWS, columns)
        return {
            "rms_norm_fp8": (first, random(columns)),
            "add_rms_norm_fp8": (first, random(columns), second),
            "silu_mul_fp8": (first, second),
            "quantise_fp8": (first,),
        }[op]

    inputs = held(make)
    plain = _plain(op, mode)
    inward = {"rms_norm_fp8": 2, "add_rms_norm_fp8": 6, "silu_mul_fp8": 4, "quantise_fp8": 2}[op]
    scales = {"row": 1, "block": columns // GROUP, "tensor": 0}[mode]
    return Case(
        op=f"{op} {mode}",
        size=f"{ROWS}x{columns}",
        unit="GB/s",
        amount=ROWS * (columns * (inward * (2 if mode == "tensor" else 1) + 1) + 4 * scales),
        contenders={
            "eager": lambda: step(plain, inputs()),
            "torch.compile": lambda: step(torch.compile(plain), inputs()),
            "kpt": lambda: step(_own(op, mode), inputs()),
        },
        reference=lambda: step(plain, _as_given(op, inputs()))(),
        ahead=("torch.compile", 1.6) if "norm" in op else ("torch.compile", 1.0),
        rank=rank,
        note="errors are of the codes: a neighbouring code differs by 6 % or more",
    )


def _as_given(op: str, inputs: tuple[Any, ...]) -> list[Any]:
    """In fp32, but for a residual's sum, which is rounded before it is normalised."""
    return list(inputs) if op.startswith("add") else widened(inputs)
