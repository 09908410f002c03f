"""quantise_fp8 and silu_mul_fp8, and what they share with norms that quantise their result.

Scales for blocks of 128 columns: DeepSeek-AI 2024, arXiv:2412.19437, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from kpt_plugin_triton.checks import (
    FLOATS,
    check_same_device,
    check_shape,
    check_tensor,
    check_weights,
    dtype_name,
    refuse,
)
from kpt_plugin_triton.fp8 import FP8, encoding, fp8_dtype, largest
from kpt_plugin_triton.kernels import quantise as device
from kpt_plugin_triton.launch import Kernel, ceil_div, power_of_two, processors
from kpt_plugin_triton.references.quantise import GROUP, MODES
from kpt_plugin_triton.registration import needs_grad, register
from kpt_plugin_triton.rows import contiguous, dense, rows_of
from kpt_plugin_triton.tuner import Workload, work_device
from kpt_plugin_triton.tuning import Options, Tuned

#: Columns of a row that go into registers as a whole (twice as many spill), and columns at a time elsewhere.
LONGEST = 16384
_CHUNK = 2048

_quantise = Kernel(device.quantise_rows)
_largest = Kernel(device.largest_rows)


def _rule(itemsize: int, columns: int) -> dict[str, int]:
    block = power_of_two(columns)
    rows = max(1, min(32, 2048 // block))
    return {"ROWS": rows, "num_warps": max(2, min(16, rows * block // 512))}


def _candidates(itemsize: int, columns: int) -> Iterator[dict[str, int]]:
    block = power_of_two(columns)
    for rows in (1, 2, 4, 8, 16, 32):
        for warps in (1, 2, 4, 8, 16, 32):
            if 8 <= rows * block // (32 * warps) <= 64:
                yield {"ROWS": rows, "num_warps": warps}


options_of = Tuned("quantise_rows", ("columns",), _rule, _candidates)


def run(
    kind: str,
    x: torch.Tensor,
    other: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    given: torch.Tensor | None,
    eps: float,
    offset: float,
    mode: str,
    dtype: torch.dtype,
    options: Options | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(fp8, scale, x + other); the last is None unless ``kind`` is a norm and ``other`` its residual.

    ``kind`` is "plain", "glu" (x and other being gate and up), "rms" or "layer".
    """
    columns = x.shape[-1]
    norm = kind in ("rms", "layer")
    q = torch.empty(x.shape, dtype=dtype, device=x.device)
    total = dense(x) if norm and other is not None else None
    scale = given if given is not None else _empty_scale(x, mode)
    flat, rows, stride = rows_of(x)
    if rows == 0:
        return q, scale.fill_(1.0) if given is None else scale, total
    more, more_stride = None, 0
    if other is not None:
        more, _, more_stride = rows_of(other)
    in_pieces = not norm and mode != "row"
    block = power_of_two(columns)
    if in_pieces:
        block = min(block, _CHUNK)
    if mode == "block":
        block = max(block, GROUP)
    if options is None:
        options = options_of(x.device.index, x.element_size(), min(columns, block))
    each, warps = options["ROWS"], options["num_warps"]
    tiles = ceil_div(rows, each) * ceil_div(columns, block)
    maxima, parts, stored = None, 1, total
    if mode == "tensor" and given is None:
        parts = min(tiles, 4 * processors(x.device.index))
        maxima = torch.empty(parts, dtype=torch.float32, device=x.device)
        _largest(
            (parts, 1, 1),
            (flat, more, weight, bias, total, maxima, rows, stride, more_stride, eps, offset),
            (columns, block, each, kind),
            min(16, 2 * warps),  # the loop keeps more in registers than one tile
        )
        if total is not None:  # one tensor to read instead of two
            flat, stride, more, more_stride, stored = total, columns, None, 0, None
    target, bits = encoding(q)
    _quantise(
        (tiles, 1, 1),
        (
            *(flat, more, weight, bias, given, target, stored, scale, maxima),
            *(rows, parts, stride, more_stride, eps, offset),
        ),
        (columns, block, each, power_of_two(parts), kind, mode, GROUP, largest(dtype), bits),
        warps,
    )
    return q, scale, total


def _empty_scale(x: torch.Tensor, mode: str) -> torch.Tensor:
    if mode == "tensor":
        return x.new_empty((), dtype=torch.float32)
    width = 1 if mode == "row" else ceil_div(x.shape[-1], GROUP)
    return x.new_empty((*x.shape[:-1], width), dtype=torch.float32)


# ---------------------------------------------------------------------------------------------
# What the compiler sees


def _op(
    x: torch.Tensor,
    other: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    given: torch.Tensor | None,
    eps: float,
    offset: float,
    kind: str,
    mode: str,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, scale, total = run(kind, x, other, weight, bias, given, eps, offset, mode, dtype)
    # an op may not return its input
    return q, x.new_empty(0) if given is not None else scale, x.new_empty(0) if total is None else total


def _fake(
    x: Any,
    other: Any,
    weight: Any,
    bias: Any,
    given: Any,
    eps: float,
    offset: float,
    kind: str,
    mode: str,
    dtype: Any,
) -> Any:
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(0) if given is not None else _empty_scale(x, mode),
        x.new_empty(x.shape if other is not None and kind in ("rms", "layer") else 0),
    )


quantise_rows = register(
    "quantise_rows(Tensor x, Tensor? other, Tensor? weight, Tensor? bias, Tensor? given, float eps, "
    "float offset, str kind, str mode, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    _op,
    _fake,
)


def check(
    op: str,
    names: tuple[str, str],
    x: Any,
    other: Any,
    weight: Any,
    bias: Any,
    given: Any,
    mode: str,
    dtype: Any,
) -> None:
    """Refuse what the kernels do not take; ``names`` are those of x and other in ``op``."""
    check_tensor(op, names[0], x, FLOATS)
    whole = op.endswith("norm_fp8") or mode == "row"
    if x.shape[-1] == 0 or (whole and x.shape[-1] > LONGEST):
        refuse(
            op,
            names[0],
            f"of shape {tuple(x.shape)}",
            f"1 to {LONGEST} columns" if whole else "at least one column",
        )
    if other is not None:
        check_tensor(op, names[1], other, (x.dtype,))
        check_shape(op, names[1], other, x.shape)
        check_same_device(op, names[1], other, x)
    check_weights(op, weight, bias, x, x.shape[-1], FLOATS)
    if mode not in MODES:
        refuse(op, "mode", repr(mode), ", ".join(MODES))
    if given is not None:
        check_tensor(op, "scale", given, (torch.float32,), at_least=0)
        check_same_device(op, "scale", given, x)
        if mode != "tensor" or given.numel() != 1:
            refuse(
                op,
                "scale",
                f"of shape {tuple(given.shape)} in the mode {mode!r}",
                "one number in the mode 'tensor'",
            )
    if dtype is not None and dtype not in FP8:
        passed = dtype_name(dtype) if isinstance(dtype, torch.dtype) else repr(dtype)
        refuse(op, "dtype", passed, ", ".join(map(dtype_name, FP8)))
    for name, value in ((names[0], x), (names[1], other), ("weight", weight), ("bias", bias)):
        if needs_grad(value):
            refuse(op, name, "a tensor that requires grad", "inputs without gradients (torch.no_grad())")


def quantised(
    op: str,
    names: tuple[str, str],
    kind: str,
    x: Any,
    other: Any,
    weight: Any,
    bias: Any,
    given: Any,
    eps: float,
    offset: float,
    mode: str,
    dtype: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Check and run one of the ops, eagerly or inside a graph; results as of `run`."""
    if torch.compiler.is_compiling():
        q, scale, total = quantise_rows(
            x, other, weight, bias, given, eps, offset, kind, mode, dtype or fp8_dtype(x.device)
        )
        return q, scale if given is None else given.reshape(()), total
    check(op, names, x, other, weight, bias, given, mode, dtype)
    weight, bias = contiguous(weight), contiguous(bias)
    if given is not None:
        given = given.reshape(())
    return run(kind, x, other, weight, bias, given, eps, offset, mode, dtype or fp8_dtype(x.device))


# ---------------------------------------------------------------------------------------------
# The functions that kernels' specs name


def quantise_fp8(
    x: torch.Tensor,
    mode: str = "row",
    scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [..., D] as (fp8 [..., D], scale in fp32), ``fp8 * scale`` being near x.

    ``mode`` is "row" (scales [..., 1]), "block" (scales [..., ceil(D / 128)], one for 128) or "tensor"
    (one number: ``scale`` if given, which saves one pass over x). x is bf16, fp16 or fp32. Values beyond
    the range of the type saturate, NaN stays NaN, and zeros alone have scale 1. ``dtype`` is float8_e4m3fn or
    float8_e4m3fnuz, by default the one that the GPU computes with. Not differentiable. Rows may be spaced
    anyhow; other strides are copied first.

    Raises:
        KernelInputError: an argument's device, dtype or shape is not supported, or requires grad.
    """
    q, found, _ = quantised(
        "quantise_fp8", ("x", ""), "plain", x, None, None, None, scale, 0.0, 0.0, mode, dtype
    )
    return q, found


def silu_mul_fp8(
    gate: torch.Tensor,
    up: torch.Tensor,
    mode: str = "row",
    scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantise_fp8` of ``silu(gate) * up`` in the same pass; gate and up may be halves of one tensor."""
    if up is None:
        refuse("silu_mul_fp8", "up", "a NoneType", "a tensor")
    q, found, _ = quantised(
        "silu_mul_fp8", ("gate", "up"), "glu", gate, up, None, None, scale, 0.0, 0.0, mode, dtype
    )
    return q, found


# ---------------------------------------------------------------------------------------------
# What tuning measures


def _work(dtype: torch.dtype, columns: int) -> Callable[[Options], Callable[[], Any]]:
    rows = max(64, min(65536, 2**28 // (columns * dtype.itemsize)))
    x = torch.randn(rows, columns, dtype=dtype, device=work_device())
    weight = torch.randn(columns, dtype=dtype, device=work_device())
    fp8 = fp8_dtype(x.device)

    def with_options(options: Options) -> Callable[[], Any]:
        return lambda: run("rms", x, None, weight, None, None, 1e-6, 0.0, "row", fp8, options)

    return with_options


WORKLOADS = [
    Workload(options_of, tuple((width,) for width in (128, 512, 1024, 2048, 4096, 5120, 8192, 16384)), _work)
]
