"""bias_activation: a bias and an activation function in one pass, with gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton.language as tl

from kpt_plugin_triton.checks import FLOATS, check_same_device, check_shape, check_tensor, refuse
from kpt_plugin_triton.kernels import activations as device
from kpt_plugin_triton.kernels.norms import column_sums
from kpt_plugin_triton.launch import Kernel, ceil_div, power_of_two, processors
from kpt_plugin_triton.registration import applier, needs_grad, once_differentiable, register
from kpt_plugin_triton.rows import dense, rows_of, wide_dtype
from kpt_plugin_triton.tuner import Workload, work_device
from kpt_plugin_triton.tuning import Options, Tuned

#: Activation functions by the names that the core gives them.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
DTYPES = (*FLOATS, torch.float64)

_forward = Kernel(device.bias_activation_forward)
_backward = Kernel(device.bias_activation_backward)
_column_sums = Kernel(column_sums)


def check_activation(op: str, activation: object) -> None:
    if activation not in ACTIVATIONS:
        refuse(op, "activation", repr(activation), ", ".join(ACTIVATIONS))


def tile(elements: int, columns: int) -> tuple[int, int]:
    """(rows, columns) of a tile of so many elements, for rows of ``columns``; both powers of two."""
    block = min(power_of_two(columns), elements)
    return elements // block, block


def wide_of(dtype: torch.dtype) -> Any:
    """What Triton computes in for tensors of ``dtype``."""
    return tl.float64 if wide_dtype(dtype) is torch.float64 else tl.float32


def _forward_rule(itemsize: int, columns: int) -> dict[str, int]:
    return {"ELEMENTS": 1024, "num_warps": 4}


def _backward_rule(itemsize: int, columns: int) -> dict[str, int]:
    return {"ELEMENTS": 1024, "PROGRAMS": 8, "num_warps": 4}


def _forward_candidates(itemsize: int, columns: int) -> Iterator[dict[str, int]]:
    for elements in (256, 512, 1024, 2048, 4096):
        for warps in (1, 2, 4, 8):
            if 4 <= elements // (32 * warps) <= 32:
                yield {"ELEMENTS": elements, "num_warps": warps}


def _backward_candidates(itemsize: int, columns: int) -> Iterator[dict[str, int]]:
    for options in _forward_candidates(itemsize, columns):
        for programs in (4, 8, 16):
            yield {**options, "PROGRAMS": programs}


forward_options = Tuned("bias_activation_forward", ("columns",), _forward_rule, _forward_candidates)
backward_options = Tuned("bias_activation_backward", ("columns",), _backward_rule, _backward_candidates)


def _run_forward(
    x: torch.Tensor, bias: torch.Tensor | None, activation: str, options: Options | None = None
) -> torch.Tensor:
    y = dense(x)
    if x.numel() == 0:
        return y
    columns = x.shape[-1]
    flat, rows, stride = rows_of(x)
    if options is None:
        options = forward_options(x.device.index, x.element_size(), columns)
    each, block = tile(options["ELEMENTS"], columns)
    _forward(
        (ceil_div(rows, each) * ceil_div(columns, block), 1, 1),
        (flat, bias, y, rows, columns, stride),
        (each, block, activation, wide_of(x.dtype)),
        options["num_warps"],
    )
    return y


def _run_backward(
    x: torch.Tensor,
    dy: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    want_bias: bool,
    options: Options | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(dx, dbias)."""
    dx = dense(x)
    dbias = torch.empty_like(bias) if want_bias and bias is not None else None
    if x.numel() == 0:
        return dx, None if dbias is None else dbias.zero_()
    columns = x.shape[-1]
    flat, rows, stride = rows_of(x)
    grad, _, grad_stride = rows_of(dy)
    if options is None:
        options = backward_options(x.device.index, x.element_size(), columns)
    each, block = tile(options["ELEMENTS"], columns)
    blocks = ceil_div(columns, block)
    programs = ceil_div(options["PROGRAMS"] * processors(x.device.index), blocks)
    programs = min(ceil_div(rows, each), programs, 65535)
    sums = None
    if dbias is not None:
        sums = torch.empty((programs, columns), dtype=wide_dtype(x.dtype), device=x.device)
    wide = wide_of(x.dtype)
    _backward(
        (blocks, programs, 1),
        (flat, grad, bias, dx, sums, rows, columns, stride, grad_stride),
        (each, block, activation, wide),
        options["num_warps"],
    )
    if dbias is not None:
        _column_sums(
            (ceil_div(columns, 32), 1, 1), (sums, None, dbias, None, programs), (columns, 32, 64, wide), 8
        )
    return dx, dbias


class _BiasActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
        ctx.save_for_backward(x, bias)
        ctx.activation = activation
        return _run_forward(x, bias, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, bias = ctx.saved_tensors
        return *_run_backward(x, dy, bias, ctx.activation, ctx.needs_input_grad[1]), None


_apply = applier(_BiasActivation)


# ---------------------------------------------------------------------------------------------
# What the compiler sees


def _op_forward(x: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    _check(x, bias, activation)
    return _run_forward(x, _side_by_side(bias), activation)


def _op_backward(
    x: torch.Tensor, dy: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dbias = _run_backward(x, dy, _side_by_side(bias), activation, True)
    return dx, x.new_empty(0) if dbias is None else dbias


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    x, bias, ctx.activation = inputs
    ctx.save_for_backward(x, bias)


def _differentiate(ctx: Any, dy: torch.Tensor) -> Any:
    x, bias = ctx.saved_tensors
    dx, dbias = backward_op(x, dy, bias, ctx.activation)
    return dx, None if bias is None else dbias, None


backward_op = register(
    "bias_activation_backward(Tensor x, Tensor dy, Tensor? bias, str activation) -> (Tensor, Tensor)",
    _op_backward,
    lambda x, dy, bias, activation: (
        x.new_empty(x.shape),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    ),
)
forward_op = register(
    "bias_activation(Tensor x, Tensor? bias, str activation) -> Tensor",
    _op_forward,
    lambda x, bias, activation: x.new_empty(x.shape),
    _differentiate,
    _remember,
)

# ---------------------------------------------------------------------------------------------
# The function that the kernel's spec names


def _check(x: Any, bias: Any, activation: Any) -> None:
    check_activation("bias_activation", activation)
    check_tensor("bias_activation", "x", x, DTYPES)
    if bias is not None:
        check_tensor("bias_activation", "bias", bias, DTYPES)
        check_shape("bias_activation", "bias", bias, x.shape[-1:])
        check_same_device("bias_activation", "bias", bias, x)


def _side_by_side(bias: torch.Tensor | None) -> torch.Tensor | None:
    return bias if bias is None or bias.is_contiguous() else bias.contiguous()


def bias_activation(
    x: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "gelu"
) -> torch.Tensor:
    """``activation(x + bias)`` for ``x`` [..., D] and ``bias`` [D] or None, contiguous.

    ``activation`` is silu, gelu (exact), gelu_tanh or relu. bf16, fp16, fp32 or fp64, computed in fp32 (fp64
    for fp64). Rows may be spaced anyhow; other strides are copied first. Differentiable once.

    Raises:
        KernelInputError: an argument's device, dtype or shape, or the activation, is not supported.
    """
    if torch.compiler.is_compiling():
        return forward_op(x, bias, activation)  # type: ignore[no-any-return]
    _check(x, bias, activation)
    bias = _side_by_side(bias)
    if needs_grad(x, bias):
        return _apply(x, bias, activation)  # type: ignore[no-any-return]
    return _run_forward(x, bias, activation)


# ---------------------------------------------------------------------------------------------
# What tuning measures


def _work(dtype: torch.dtype, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = max(64, 2**27 // (columns * dtype.itemsize))
    x = torch.randn(rows, columns, dtype=dtype, device=work_device())
    return x, torch.randn(columns, dtype=dtype, device=work_device())


def _forward_work(dtype: torch.dtype, columns: int) -> Callable[[Options], Callable[[], Any]]:
    x, bias = _work(dtype, columns)
    return lambda options: lambda: _run_forward(x, bias, "gelu", options)


def _backward_work(dtype: torch.dtype, columns: int) -> Callable[[Options], Callable[[], Any]]:
    x, bias = _work(dtype, columns)
    return lambda options: lambda: _run_backward(x, x, bias, "gelu", True, options)


_WIDTHS = ((768,), (3072,), (8192,))
WORKLOADS = [
    Workload(forward_options, _WIDTHS, _forward_work),
    Workload(backward_options, _WIDTHS, _backward_work),
]
