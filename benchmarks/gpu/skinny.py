"""Products with few rows: what generation is made of. Bytes: the weight, read once.

Weights are taken in turn from as many copies as exceed the L2 cache, inside a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from gpu.case import Case, Prepare
from gpu.inputs import held, random

#: Output features, input features; the first ones are Llama-8B's.
SHAPES = ((28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096), (128256, 4096))
ROWS = (1, 4, 16)
GOAL = 3200.0
_L2 = 300e6


def cases() -> Iterator[Case]:
    for number, (features, depth) in enumerate(SHAPES):
        for rows in ROWS:
            yield _case(rows, features, depth, "bf16", 2 if number == 0 else 4 + number)
    for rows in ROWS:
        for width in ("int8", "fp8"):
            yield _case(rows, *SHAPES[0], width, 3 if rows == 1 else 6)


def _case(rows: int, features: int, depth: int, width: str, rank: int) -> Case:
    size = features * depth * (2 if width == "bf16" else 1)
    copies = max(1, -(-int(_L2) // size))

    def make() -> tuple[Any, ...]:
        x = random(rows, depth)
        weights = [random(features, depth, factor=depth**-0.5) for _ in range(copies)]
        return x, weights

    inputs = held(make)

    def each(prepare: Callable[[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]) -> Prepare:
        def call() -> Callable[[], Any]:
            x, weights = inputs()
            products = [prepare(weight) for weight in weights]

            def run() -> torch.Tensor:
                for product in products:
                    y = product(x)
                return y

            return run

        return call

    def own(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        from kpt_plugin_triton import skinny

        if width == "bf16":
            return lambda x: skinny.linear(x, weight)
        packed, scale = getattr(skinny, f"quantise_{width}")(weight)
        product = getattr(skinny, f"linear_{width}")
        return lambda x: product(x, packed, scale)  # type: ignore[no-any-return]

    def torchao(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

        features, depth = weight.shape
        module = torch.nn.Linear(depth, features, bias=False, device=weight.device, dtype=weight.dtype)
        module.weight.data = weight
        quantize_(module, Int8WeightOnlyConfig() if width == "int8" else Float8WeightOnlyConfig())
        module.requires_grad_(False)
        return torch.compile(module)  # type: ignore[no-any-return]

    contenders: dict[str, Prepare] = {"eager": each(lambda weight: lambda x: F.linear(x, weight))}
    if width != "bf16":
        contenders = {"eager bf16": contenders["eager"], "torchao": each(torchao)}
    contenders["kpt"] = each(own)

    def reference() -> Any:
        x, weights = inputs()
        return F.linear(x.float(), weights[-1].float())

    return Case(
        op=f"linear {width} M={rows}",
        size=f"{features}x{depth}",
        unit="GB/s",
        amount=copies * size,
        contenders=contenders,
        reference=reference,
        goal=GOAL,
        graph=True,
        rank=rank,
        note="" if width == "bf16" else "eager bf16 reads twice the bytes that are counted",
    )
