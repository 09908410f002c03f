"""linear, linear_int8 and linear_fp8 for few rows, where reading the weight is all that takes time.

More than `MOST_ROWS` rows, gradients and layouts that the kernels do not read go to PyTorch, so that the
functions are right for every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from kpt.ops.references.mlp import ACTIVATIONS as NAMED
from kpt_plugin_triton.checks import FLOATS, check_same_device, check_shape, check_tensor, refuse
from kpt_plugin_triton.fp8 import FP8, encoding, fp8_dtype, largest
from kpt_plugin_triton.kernels import skinny as device
from kpt_plugin_triton.launch import Kernel, ceil_div, overlaps, processors
from kpt_plugin_triton.references.skinny import dequantised
from kpt_plugin_triton.registration import needs_grad, register
from kpt_plugin_triton.rows import rows_of
from kpt_plugin_triton.tuner import Workload, work_device
from kpt_plugin_triton.tuning import Options, Tuned

#: One tile of the matrix units; beyond it a product is no longer bound by the weight alone.
MOST_ROWS = 16
ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {"none": lambda y: y, **NAMED}
_DTYPES = (torch.bfloat16, torch.float16)

_vector = Kernel(device.skinny_vector)
_early_vector = Kernel(device.skinny_vector, overlapped=True)
_dot = Kernel(device.skinny_dot)
_early_dot = Kernel(device.skinny_dot, overlapped=True)
_sum = Kernel(device.skinny_sum)


def _vector_rule(itemsize: int, features: int, depth: int) -> dict[str, int]:
    # 8 loads of 16 bytes a thread; fewer features a program where there would be too few programs.
    # A weight of one byte needs x twice as wide as a load, which costs least through shared memory.
    block = 8 if features >= 4096 else 4 if features >= 1024 else 2 if features >= 256 else 1
    return {
        "BLOCK_N": block,
        "BLOCK_K": 1024 if itemsize == 2 else 2048,
        "SPLITS": 0,
        "STAGES": 1 if itemsize == 2 else 3,
        "num_warps": 4,
    }


def _vector_candidates(itemsize: int, features: int, depth: int) -> Iterator[dict[str, int]]:
    for width in (512, 1024, 2048, 4096):
        for block in (1, 2, 4, 8, 16):
            for warps in (1, 2, 4, 8):
                loads = block * width * itemsize // (16 * 32 * warps)
                if width * itemsize < 512 * warps or not 2 <= loads <= 16:
                    continue
                for stages in (1, 3) if block * width * itemsize <= 16384 else (1,):
                    yield {
                        "BLOCK_N": block,
                        "BLOCK_K": width,
                        "SPLITS": 0,
                        "STAGES": stages,
                        "num_warps": warps,
                    }


def _dot_rule(itemsize: int, features: int, depth: int) -> dict[str, int]:
    # About 128 programs at least; x is read again by each, so that wide ones are better. The largest choice
    # takes 60 KiB, which every supported chip has.
    block = 64 if features >= 16384 else 32 if features >= 4096 else 16
    return {"BLOCK_N": block, "BLOCK_K": 128, "SPLITS": 0, "num_warps": 4, "num_stages": 4, "EARLY": 0}


def _dot_candidates(itemsize: int, features: int, depth: int) -> Iterator[dict[str, int]]:
    for block in (16, 32, 64, 128):
        for width in (64, 128, 256, 512):
            stage = block * width * itemsize + 32 * width
            for warps in (2, 4, 8):
                for stages in (2, 3, 4, 5, 6, 8):
                    if 16384 <= stage * stages <= 163840 and 2048 <= block * width <= 8192 * warps:
                        few = ceil_div(features, block) <= 256
                        # (splits, blocks that are fetched early)
                        for splits, early in ((1, 0), (2, 0), (4, 0), (1, 4)) if few else ((1, 0),):
                            yield {
                                "BLOCK_N": block,
                                "BLOCK_K": width,
                                "SPLITS": splits,
                                "num_warps": warps,
                                "num_stages": stages,
                                "EARLY": early,
                            }


vector_options = Tuned("skinny_vector", ("features", "depth"), _vector_rule, _vector_candidates)
dot_options = Tuned("skinny_dot", ("features", "depth"), _dot_rule, _dot_candidates)


def _splits(wanted: int, programs: int, steps: int, count: int) -> int:
    """Into how many parts K goes: as asked, or (0) so many that most multiprocessors have a program."""
    if wanted:
        return max(1, min(wanted, steps))
    if programs * 4 >= count * 3:
        return 1
    # Parts of four steps at least, and as many as a second kernel is worth.
    return max(1, min(ceil_div(count, programs), steps // 4, 32))


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str,
    options: Options | None = None,
) -> torch.Tensor:
    """The product of at most `MOST_ROWS` rows; ``weight`` [N, K] with columns side by side."""
    features, depth = weight.shape
    out = torch.empty((*x.shape[:-1], features), dtype=x.dtype, device=x.device)
    flat, rows, stride = rows_of(x)
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    bits = 0
    if weight.dtype in FP8:
        weight, bits = encoding(weight)
    itemsize = weight.element_size()
    index = x.device.index
    chooser = vector_options if rows == 1 else dot_options
    if options is None:
        options = chooser(index, itemsize, features, depth)
    block, width = options["BLOCK_N"], options["BLOCK_K"]
    programs, steps = ceil_div(features, block), ceil_div(depth, width)
    splits = _splits(options["SPLITS"], programs, steps, processors(index))
    parts = None
    if splits > 1:
        parts = torch.empty((splits, rows, features), dtype=torch.float32, device=x.device)
    even = depth % width == 0
    overlapped = overlaps(index)
    warps = options["num_warps"]
    scale_stride = 0 if scale is None or scale.numel() == 1 else scale.stride(0)
    given = (flat, weight, scale, bias, out, parts)
    strides = (weight.stride(0), scale_stride)
    if rows == 1:
        # 3809 GB/s became 3276 with weights of one byte (28672x4096, H200)
        early = overlapped and itemsize == 2
        (_early_vector if early else _vector)(
            (programs, splits, 1),
            (*given, features, depth, *strides),
            (block, width, 16 // itemsize, splits, options["STAGES"], even, bits, activation, early),
            warps,
        )
    else:
        ahead = options.get("EARLY", 0) if overlapped else 0
        (_early_dot if ahead else _dot)(
            (programs, splits, 1),
            (*given, rows, features, depth, stride, *strides),
            (block, width, splits, even, bits, activation, ahead),
            warps,
            options["num_stages"],
        )
    if parts is not None:
        size = rows * features
        _sum(
            (ceil_div(size, 256), 1, 1),
            (parts, scale, bias, out, size, features, scale_stride),
            (256, splits, bits, activation),
            2,
        )
    return out


def _fake(x: Any, weight: Any, scale: Any, bias: Any, activation: str) -> Any:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


skinny_product = register(
    "skinny_product(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, str activation) -> Tensor",
    _run,
    _fake,
)

# ---------------------------------------------------------------------------------------------
# The functions that kernels' specs name


def _check(
    op: str, x: Any, weight: Any, scale: Any, bias: Any, dtypes: tuple[torch.dtype, ...], activation: str
) -> None:
    check_tensor(op, "x", x, _DTYPES)
    check_tensor(op, "weight", weight, dtypes or (x.dtype,), at_least=2)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        refuse(op, "weight", f"of shape {tuple(weight.shape)}", f"[N, {x.shape[-1]}], x being [..., K]")
    check_same_device(op, "weight", weight, x)
    if dtypes:
        check_tensor(op, "scale", scale, FLOATS, at_least=0)
        if scale.dim() > 1 or (scale.numel() != 1 and scale.numel() != weight.shape[0]):
            refuse(op, "scale", f"of shape {tuple(scale.shape)}", f"[{weight.shape[0]}] or one number")
        check_same_device(op, "scale", scale, x)
    if bias is not None:
        check_tensor(op, "bias", bias, FLOATS)
        check_shape(op, "bias", bias, weight.shape[:1])
        check_same_device(op, "bias", bias, x)
    if activation not in ACTIVATIONS:
        refuse(op, "activation", repr(activation), ", ".join(ACTIVATIONS))


def _product(
    op: str, x: Any, weight: Any, scale: Any, bias: Any, dtypes: tuple[torch.dtype, ...], activation: str
) -> Any:
    compiling = torch.compiler.is_compiling()
    if not compiling:
        _check(op, x, weight, scale, bias, dtypes, activation)
    served = (
        0 < x.numel() <= MOST_ROWS * x.shape[-1]
        and weight.shape[0] > 0
        and weight.stride(1) == 1
        and not needs_grad(x, weight, scale, bias)
    )
    if served:
        if compiling:
            return skinny_product(x, weight, scale, bias, activation)
        return _run(x, weight, scale, bias, activation)
    if scale is not None:
        weight = dequantised(weight, scale, x.dtype)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    return ACTIVATIONS[activation](F.linear(x, weight, bias))


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
) -> torch.Tensor:
    """``activation(x @ weight.T + bias)``: x [..., K], weight [N, K], bias [N]; sums in fp32.

    bf16 or fp16, x and weight alike. At most 16 rows of x, a weight whose columns lie side by side, and no
    gradients: one pass over the weight, the bits of the result always the same. Any other call is
    `torch.nn.functional.linear`. ``activation`` is one of none, relu, silu, gelu and gelu_tanh.

    Raises:
        KernelInputError: an argument's device, dtype or shape is not supported.
    """
    return _product("linear", x, weight, None, bias, (), activation)  # type: ignore[no-any-return]


def linear_int8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
) -> torch.Tensor:
    """As `linear`, with a weight in int8 and ``scale`` [N] (or one number), as `quantise_int8` gives.

    Products are of the dtype of x, bf16 or fp16: only the weight is quantised. Other calls dequantise the
    weight first; gradients reach x and the bias.
    """
    return _product("linear_int8", x, weight, scale, bias, (torch.int8,), activation)  # type: ignore[no-any-return]


def linear_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
) -> torch.Tensor:
    """As `linear_int8`, with a weight in float8_e4m3fn or float8_e4m3fnuz, on every GPU.

    One without conversions of that type takes the bits apart.
    """
    return _product("linear_fp8", x, weight, scale, bias, FP8, activation)  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------
# Weights, quantised once


def _scales(weight: torch.Tensor, most: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight in fp32, scale [N]); a row of zeros has scale 1."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"weight is {weight.dtype} of shape {tuple(weight.shape)}; give a floating-point matrix [N, K]"
        )
    wide = weight.detach().float()
    if wide.shape[1] == 0:
        return wide, torch.ones(wide.shape[0], device=wide.device)
    scale = wide.abs().amax(1) / most
    return wide, torch.where(scale > 0, scale, 1.0)


def quantise_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight`` [N, K] as (int8 [N, K], scale [N] in fp32), symmetric, one scale per output feature.

    Raises:
        ValueError: it is no floating-point matrix.
    """
    wide, scale = _scales(weight, 127.0)
    return (wide / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


def quantise_fp8(weight: torch.Tensor, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight`` [N, K] as (fp8 [N, K], scale [N] in fp32); ``dtype`` is by default its device's flavour.

    Raises:
        ValueError: it is no floating-point matrix.
    """
    dtype = dtype or fp8_dtype(weight.device)
    most = largest(dtype)
    wide, scale = _scales(weight, most)
    return (wide / scale[:, None]).clamp_(-most, most).to(dtype), scale


# ---------------------------------------------------------------------------------------------
# What tuning measures

#: Bytes of weights that are read in turn, so that none is found in a cache.
_COLD = 300e6


def _random_weight(dtype: torch.dtype, features: int, depth: int) -> torch.Tensor:
    weight = torch.randn(features, depth, dtype=torch.bfloat16, device=work_device())
    return weight.mul_(40).clamp_(-127, 127).to(torch.int8) if dtype.itemsize == 1 else weight


def _work(rows: int) -> Callable[..., Callable[[Options], Callable[[], Any]]]:
    def prepare(dtype: torch.dtype, features: int, depth: int) -> Callable[[Options], Callable[[], Any]]:
        x = torch.randn(rows, depth, dtype=torch.bfloat16, device=work_device())
        weights = [
            _random_weight(dtype, features, depth)
            for _ in range(max(1, ceil_div(int(_COLD), features * depth * dtype.itemsize)))
        ]
        scale = torch.rand(features, device=work_device()) if dtype.itemsize == 1 else None

        def with_options(options: Options) -> Callable[[], Any]:
            return lambda: [_run(x, weight, scale, None, "none", options) for weight in weights][-1]

        return with_options

    return prepare


_SHAPES = (
    (1024, 4096),
    (4096, 4096),
    (6144, 4096),
    (28672, 4096),
    (4096, 14336),
    (128256, 4096),
    (2048, 2048),
    (16384, 2048),
    (2048, 8192),
)
_WIDTHS = (torch.bfloat16, torch.int8)
WORKLOADS = [
    Workload(vector_options, _SHAPES, _work(1), _WIDTHS, replayed=True),
    Workload(dot_options, _SHAPES, _work(16), _WIDTHS, replayed=True),
]
