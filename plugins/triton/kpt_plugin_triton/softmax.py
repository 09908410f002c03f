"""softmax along one dimension, with gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton.language as tl

from kpt_plugin_triton import staged_softmax
from kpt_plugin_triton.checks import FLOATS, check_tensor, refuse
from kpt_plugin_triton.kernels import softmax as device
from kpt_plugin_triton.launch import Kernel, ceil_div, power_of_two
from kpt_plugin_triton.registration import applier, needs_grad, once_differentiable, register
from kpt_plugin_triton.rows import dense, rows_of, unit_of
from kpt_plugin_triton.tuner import Workload, work_device
from kpt_plugin_triton.tuning import Options, Tuned

#: Bytes of one row that still go into registers as a whole, forward and backward.
_LONGEST = 65536
_LONGEST_BACKWARD = 32768
#: Bytes of a row that are worked on at a time where it does not.
_LONG_BLOCK = 32768
_DTYPES = (*FLOATS, torch.float64)

_forward = Kernel(device.softmax_forward)
_forward_long = Kernel(device.softmax_forward_long)
_backward = Kernel(device.softmax_backward)
_backward_long = Kernel(device.softmax_backward_long)


def _rule(itemsize: int, columns: int) -> dict[str, int]:
    block = power_of_two(columns)
    rows = max(1, min(32, 2048 // block))
    return {"ROWS": rows, "num_warps": max(4, min(16, rows * block * itemsize // 2048))}


def _backward_rule(itemsize: int, columns: int) -> dict[str, int]:
    block = power_of_two(columns)
    rows = max(1, min(32, 2048 // block))
    # two tensors to hold
    return {"ROWS": rows, "num_warps": max(4, min(16, rows * block * itemsize // 1024))}


def _candidates(itemsize: int, columns: int) -> Iterator[dict[str, int]]:
    block = power_of_two(columns)
    for rows in (1, 2, 4, 8, 16, 32):
        for warps in (1, 2, 4, 8, 16, 32):
            if 4 <= rows * block // (32 * warps) <= 64:
                yield {"ROWS": rows, "num_warps": warps}


forward_options = Tuned("softmax_forward", ("columns",), _rule, _candidates)
backward_options = Tuned("softmax_backward", ("columns",), _backward_rule, _candidates)


def _run_forward(x: torch.Tensor, options: Options | None = None) -> torch.Tensor:
    y = dense(x)
    flat, rows, stride = rows_of(x)
    columns = x.shape[-1]
    if rows == 0:
        return y
    accumulate = tl.float64 if x.dtype == torch.float64 else tl.float32
    itemsize = x.element_size()
    if options is None and staged_softmax.forward(flat, y, rows, stride):
        return y
    unit = unit_of(itemsize, columns, stride)
    if columns * itemsize > _LONGEST:
        pieces = (unit, _LONG_BLOCK // itemsize, 16 // itemsize, accumulate)
        _forward_long((rows, 1, 1), (flat, y, rows, columns, stride), pieces, 16)
        return y
    if options is None:
        options = forward_options(x.device.index, itemsize, columns)
    each = options["ROWS"]
    constants = (unit, power_of_two(columns), each, accumulate)
    _forward((ceil_div(rows, each), 1, 1), (flat, y, rows, columns, stride), constants, options["num_warps"])
    return y


def _run_backward(y: torch.Tensor, dy: torch.Tensor, options: Options | None = None) -> torch.Tensor:
    dx = dense(y)
    flat, rows, stride = rows_of(y)
    grad, _, grad_stride = rows_of(dy)
    columns = y.shape[-1]
    if rows == 0:
        return dx
    accumulate = tl.float64 if y.dtype == torch.float64 else tl.float32
    itemsize = y.element_size()
    arguments = (flat, grad, dx, rows, columns, stride, grad_stride)
    if options is None and staged_softmax.backward(flat, grad, dx, rows, stride, grad_stride):
        return dx
    unit = unit_of(itemsize, columns, stride, grad_stride)
    if columns * itemsize > _LONGEST_BACKWARD:
        _backward_long((rows, 1, 1), arguments, (unit, _LONG_BLOCK // itemsize // 2, accumulate), 8)
        return dx
    if options is None:
        options = backward_options(y.device.index, itemsize, columns)
    each = options["ROWS"]
    constants = (unit, power_of_two(columns), each, accumulate)
    _backward((ceil_div(rows, each), 1, 1), arguments, constants, options["num_warps"])
    return dx


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y = _run_forward(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        (y,) = ctx.saved_tensors
        return _run_backward(y, dy)


_apply = applier(_Softmax)


# ---------------------------------------------------------------------------------------------
# What the compiler sees


def _op_forward(x: torch.Tensor) -> torch.Tensor:
    _check(x, -1)
    return _run_forward(x)


def _differentiate(ctx: Any, dy: torch.Tensor) -> Any:
    (y,) = ctx.saved_tensors
    return softmax_backward(y, dy)


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output)


softmax_backward = register(
    "softmax_backward(Tensor y, Tensor dy) -> Tensor", _run_backward, lambda y, dy: y.new_empty(y.shape)
)
softmax_forward = register(
    "softmax_forward(Tensor x) -> Tensor",
    _op_forward,
    lambda x: x.new_empty(x.shape),
    _differentiate,
    _remember,
)

# ---------------------------------------------------------------------------------------------
# The function that the kernel's spec names


def _check(x: Any, dim: Any) -> None:
    check_tensor("softmax", "x", x, _DTYPES)
    if type(dim) is not int or not -x.dim() <= dim < x.dim():
        refuse("softmax", "dim", repr(dim), f"an integer from {-x.dim()} to {x.dim() - 1}")


def _last(x: torch.Tensor) -> torch.Tensor:
    if torch.compiler.is_compiling():
        return softmax_forward(x)  # type: ignore[no-any-return]
    if needs_grad(x):
        return _apply(x)  # type: ignore[no-any-return]
    return _run_forward(x)


def softmax(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """``exp(x) / sum(exp(x))`` along ``dim``, of the dtype of ``x``; contiguous.

    bf16, fp16, fp32 or fp64; sums in fp32 (fp64 for fp64). Rows along the last dimension may be spaced
    anyhow; another ``dim`` is moved there and back by copies. Differentiable once.

    Raises:
        KernelInputError: an argument's device, dtype or shape is not supported.
    """
    if not torch.compiler.is_compiling():
        _check(x, dim)
    if dim in (-1, x.dim() - 1):
        return _last(x)
    return _last(x.movedim(dim, -1)).movedim(-1, dim).contiguous()


# ---------------------------------------------------------------------------------------------
# What tuning measures


def _rows(columns: int, itemsize: int) -> int:
    return max(64, min(262144, 2**28 // (columns * itemsize)))


def _forward_work(dtype: torch.dtype, columns: int) -> Callable[[Options], Callable[[], Any]]:
    x = torch.randn(_rows(columns, dtype.itemsize), columns, dtype=dtype, device=work_device())
    return lambda options: lambda: _run_forward(x, options)


def _backward_work(dtype: torch.dtype, columns: int) -> Callable[[Options], Callable[[], Any]]:
    y = torch.rand(_rows(columns, dtype.itemsize), columns, dtype=dtype, device=work_device())
    dy = torch.randn_like(y)
    return lambda options: lambda: _run_backward(y, dy, options)


_WIDTHS = (128, 512, 1024, 2048, 4096, 8192)
WORKLOADS = [
    Workload(forward_options, tuple((width,) for width in (*_WIDTHS, 16384)), _forward_work),
    Workload(backward_options, tuple((width,) for width in _WIDTHS), _backward_work),
]
