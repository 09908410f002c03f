"""rms_norm, add_rms_norm, layer_norm and add_layer_norm with gradients.

References: Zhang and Sennrich 2019, arXiv:1910.07467; Ba et al. 2016, arXiv:1607.06450.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kpt_plugin_triton.checks import FLOATS, check_same_device, check_shape, check_tensor, refuse
from kpt_plugin_triton.native import norms as native
from kpt_plugin_triton.norm_rows import (
    backward_options,
    centred_backward_options,
    centred_forward_options,
    forward_options,
    run_backward,
    run_forward,
)
from kpt_plugin_triton.registration import applier, needs_grad, register
from kpt_plugin_triton.rows import wide_dtype
from kpt_plugin_triton.tuner import Workload, work_device
from kpt_plugin_triton.tuning import Options

_DTYPES = (*FLOATS, torch.float64)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        how: tuple[float, float, bool],
    ) -> Any:
        eps, offset, centred = how
        y, total, mean, rstd = run_forward(x, residual, weight, bias, eps, offset, centred, True)
        # statistics are no inputs or outputs, so that plain attributes may hold them
        ctx.held = mean, rstd, how
        ctx.alone = total is None
        if total is None:
            ctx.save_for_backward(x, weight, bias)
            return y
        ctx.save_for_backward(total, weight, bias)
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, dtotal: torch.Tensor | None = None) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "these norms are differentiable once; call backward without create_graph"
            )
        x, weight, bias = ctx.saved_tensors
        mean, rstd, (eps, offset, centred) = ctx.held
        _, residual, wants_weight, wants_bias, _ = ctx.needs_input_grad
        if dy is None:
            dy = torch.zeros_like(x)
        dx, dweight, dbias = run_backward(
            x, dy, dtotal, weight, bias, mean, rstd, offset, wants_weight, wants_bias
        )
        if native.norm is None:
            native.begin()
        elif ctx.alone:
            wanted = (
                *(x.requires_grad, weight is not None and weight.requires_grad),
                bias is not None and bias.requires_grad,
            )
            native.offer(x, weight, bias, eps, offset, centred, wanted)
        return dx, (dx if residual else None), dweight, dbias, None


_apply = applier(_Norm)


# ---------------------------------------------------------------------------------------------
# What the compiler sees


def _op_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    y, total, mean, rstd = run_forward(x, residual, weight, bias, eps, offset, centred, True)
    nothing = x.new_empty(0)
    return y, nothing if total is None else total, x.new_empty(0) if mean is None else mean, rstd  # type: ignore[return-value]


def _fake_forward(
    x: Any, residual: Any, weight: Any, bias: Any, eps: float, offset: float, centred: bool
) -> Any:
    rows = x.numel() // x.shape[-1]
    wide = wide_dtype(x.dtype)
    y = x.new_empty(x.shape)
    total = x.new_empty(0 if residual is None else x.shape)
    mean = x.new_empty(rows, dtype=wide) if centred else x.new_empty(0)
    return y, total, mean, x.new_empty(rows, dtype=wide)


def _op_backward(
    x: torch.Tensor,
    dy: torch.Tensor,
    dtotal: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, dweight, dbias = run_backward(x, dy, dtotal, weight, bias, mean, rstd, offset, True, True)
    return dx, x.new_empty(0) if dweight is None else dweight, x.new_empty(0) if dbias is None else dbias


def _fake_backward(
    x: Any, dy: Any, dtotal: Any, weight: Any, bias: Any, mean: Any, rstd: Any, offset: float
) -> Any:
    return (
        x.new_empty(x.shape),
        x.new_empty(0) if weight is None else weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    x, residual, weight, bias, _, offset, centred = inputs
    _, total, mean, rstd = output
    ctx.save_for_backward(x if residual is None else total, weight, bias, mean, rstd)
    ctx.added, ctx.offset, ctx.centred = residual is not None, offset, centred
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Any, dtotal: Any, *_: Any) -> Any:
    x, weight, bias, mean, rstd = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    dx, dweight, dbias = norm_backward(
        x,
        dy,
        dtotal if ctx.added else None,
        weight,
        bias,
        mean if ctx.centred else None,
        rstd,
        ctx.offset,
    )
    return (
        dx,
        dx if ctx.added else None,
        None if weight is None else dweight,
        None if bias is None else dbias,
        None,
        None,
        None,
    )


norm_backward = register(
    "norm_backward(Tensor x, Tensor dy, Tensor? dtotal, Tensor? weight, Tensor? bias, Tensor? mean, "
    "Tensor rstd, float offset) -> (Tensor, Tensor, Tensor)",
    _op_backward,
    _fake_backward,
)
norm_forward = register(
    "norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float offset, "
    "bool centred) -> (Tensor, Tensor, Tensor, Tensor)",
    _op_forward,
    _fake_forward,
    _differentiate,
    _remember,
)

# ---------------------------------------------------------------------------------------------
# The functions that kernels' specs name


def _check(op: str, x: Any, residual: Any, weight: Any, bias: Any) -> None:
    check_tensor(op, "x", x, _DTYPES)
    if x.shape[-1] == 0:
        refuse(op, "x", f"of shape {tuple(x.shape)}", "at least one column")
    if residual is not None:
        check_tensor(op, "residual", residual, (x.dtype,))
        check_shape(op, "residual", residual, x.shape)
        check_same_device(op, "residual", residual, x)
    if weight is not None:
        _check_vector(op, "weight", weight, x)
    if bias is not None:
        _check_vector(op, "bias", bias, x)


def _check_vector(op: str, name: str, vector: Any, x: torch.Tensor) -> None:
    check_tensor(op, name, vector, _DTYPES)
    check_shape(op, name, vector, (x.shape[-1],))
    check_same_device(op, name, vector, x)


def _norm(
    op: str, x: Any, residual: Any, weight: Any, bias: Any, eps: float, offset: float, centred: bool
) -> Any:
    if torch.compiler.is_compiling():
        y, total, _, _ = norm_forward(x, residual, weight, bias, eps, offset, centred)
        return y if residual is None else (y, total)
    served = native.norm
    if served is not None and residual is None:
        out = served(x, weight, bias, eps, offset, centred)
        if out is not None:
            return out
    _check(op, x, residual, weight, bias)
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if needs_grad(x, residual, weight, bias):
        return _apply(x, residual, weight, bias, (float(eps), float(offset), centred))
    y, total, _, _ = run_forward(x, residual, weight, bias, float(eps), float(offset), centred, False)
    if served is not None and residual is None:
        native.offer(x, weight, bias, float(eps), float(offset), centred, (False, False, False))
    return y if residual is None else (y, total)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, offset: float = 0.0
) -> torch.Tensor:
    """``x`` [..., D] over the root mean square of its last dimension, times ``weight + offset`` [D].

    bf16, fp16, fp32 or fp64; statistics in fp32 (fp64 for fp64). Rows may be spaced anyhow; other strides
    are copied first. Differentiable once in ``x`` and ``weight``.

    Raises:
        KernelInputError: an argument's device, dtype or shape is not supported.
    """
    return _norm("rms_norm", x, None, weight, None, eps, offset, False)  # type: ignore[no-any-return]


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(rms_norm(x + residual), x + residual)`` in one pass; arguments as for `rms_norm`."""
    return _norm("add_rms_norm", x, residual, weight, None, eps, offset, False)  # type: ignore[no-any-return]


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """``x`` [..., D] normalised over its last dimension, times ``weight`` [D], plus ``bias`` [D].

    Dtypes, strides, gradients and errors as for `rms_norm`.
    """
    return _norm("layer_norm", x, None, weight, bias, eps, 0.0, True)  # type: ignore[no-any-return]


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(layer_norm(x + residual), x + residual)`` in one pass; arguments as for `layer_norm`."""
    return _norm("add_layer_norm", x, residual, weight, bias, eps, 0.0, True)  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------
# What tuning measures


def _rows(columns: int, itemsize: int) -> int:
    """Enough rows to be well past launch cost and caches: a quarter of a gigabyte."""
    return max(64, min(65536, 2**28 // (columns * itemsize)))


def _forward_work(centred: bool) -> Callable[..., Callable[[Options], Callable[[], Any]]]:
    def prepare(dtype: torch.dtype, columns: int) -> Callable[[Options], Callable[[], Any]]:
        x = torch.randn(_rows(columns, dtype.itemsize), columns, dtype=dtype, device=work_device())
        weight = torch.randn(columns, dtype=dtype, device=work_device())
        bias = torch.randn_like(weight) if centred else None

        def with_options(options: Options) -> Callable[[], Any]:
            return lambda: run_forward(x, None, weight, bias, 1e-6, 0.0, centred, True, options)

        return with_options

    return prepare


def _backward_work(centred: bool) -> Callable[..., Callable[[Options], Callable[[], Any]]]:
    def prepare(dtype: torch.dtype, columns: int) -> Callable[[Options], Callable[[], Any]]:
        x = torch.randn(_rows(columns, dtype.itemsize), columns, dtype=dtype, device=work_device())
        dy = torch.randn_like(x)
        weight = torch.randn(columns, dtype=dtype, device=work_device())
        bias = torch.randn_like(weight) if centred else None
        rstd = torch.ones(x.shape[0], device=work_device())
        mean = torch.zeros_like(rstd) if centred else None

        def with_options(options: Options) -> Callable[[], Any]:
            return lambda: run_backward(x, dy, None, weight, bias, mean, rstd, 0.0, True, centred, options)

        return with_options

    return prepare


_WIDTHS = (128, 512, 768, 1024, 2048, 4096, 5120, 8192)
WORKLOADS = [
    Workload(forward_options, tuple((width,) for width in (*_WIDTHS, 16384)), _forward_work(False)),
    Workload(backward_options, tuple((width,) for width in _WIDTHS), _backward_work(False)),
    Workload(centred_forward_options, tuple((width,) for width in (*_WIDTHS, 16384)), _forward_work(True)),
    Workload(centred_backward_options, tuple((width,) for width in _WIDTHS), _backward_work(True)),
]
