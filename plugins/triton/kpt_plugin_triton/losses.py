"""cross_entropy with class weights, label smoothing, z-loss and gradients.

A call that needs a gradient computes it together with the loss, while a row is still in a cache: memory sees
the logits once and the gradient once, 2 passes where a separate backward makes 3. The gradient goes into a
buffer of its own, so that a training step takes as much memory at its peak as with a separate backward. The
upstream gradient of a scalar loss is 1 nearly always; where it is not, the backward pass computes the
gradient again, and a kernel decides that on the device, without waiting for it. With ``reduction="none"``
and inside a compiled graph the gradient is left to the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kpt_plugin_triton.checks import (
    FLOATS,
    KernelInputError,
    check_same_device,
    check_shape,
    check_tensor,
    refuse,
)
from kpt_plugin_triton.loss_rows import (
    Shared,
    Terms,
    empty_loss,
    finished,
    loss_options,
    options_of,
    programs_for,
    rows_forward,
    rows_gradient,
    shared,
)
from kpt_plugin_triton.registration import applier, needs_grad, once_differentiable, register
from kpt_plugin_triton.rows import dense, wide_dtype
from kpt_plugin_triton.tuner import Workload, work_device
from kpt_plugin_triton.tuning import Options

_DTYPES = (*FLOATS, torch.float64)
REDUCTIONS = ("mean", "sum", "none")


def _run_forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    terms: Terms,
    reduction: str,
    want_gradient: bool,
    want_lses: bool,
    options: Options | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, Shared]:
    """(loss, lse of each row, gradient for an upstream gradient of 1, what rows share)."""
    rows = logits.shape[0]
    common = shared(target, weight, terms, reduction == "mean", logits)
    wide = wide_dtype(logits.dtype)
    gradient = dense(logits) if want_gradient else None
    lses = torch.empty(rows, dtype=wide, device=logits.device) if want_lses else None
    if rows == 0:
        return empty_loss(reduction, logits), lses, gradient, common
    losses = partials = None
    if reduction == "none":
        losses = torch.empty(rows, dtype=logits.dtype, device=logits.device)
    else:
        programs = programs_for(logits, terms, want_gradient, options)
        partials = torch.empty(programs, dtype=wide, device=logits.device)
    rows_forward(
        logits,
        target,
        common,
        lses=lses,
        losses=losses,
        partials=partials,
        gradient=gradient,
        options=options,
    )
    loss = finished(partials, common, logits.dtype) if partials is not None else losses
    return loss, lses, gradient, common  # type: ignore[return-value]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None,
        terms: Terms,
        reduction: str,
    ) -> torch.Tensor:
        loss, lses, gradient, common = _run_forward(
            logits, target, weight, terms, reduction, reduction != "none", True
        )
        ctx.save_for_backward(logits, target, weight, lses)
        ctx.gradient, ctx.common, ctx.single = gradient, common, gradient is not None
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        # Handed out once, because the caller may write to it; a second pass computes it again.
        gradient, ctx.gradient = ctx.gradient, None
        logits, target, _, lses = ctx.saved_tensors
        single = ctx.single
        if gradient is None:
            gradient = dense(logits)
            if single and len(logits):
                rows_forward(logits, target, ctx.common, gradient=gradient)
        rows_gradient(logits, target, ctx.common, lses, upstream, gradient, unless_one=single)
        return gradient, None, None, None, None


_apply = applier(_CrossEntropy)


# ---------------------------------------------------------------------------------------------
# What the compiler sees


def _op_forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    z_loss: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(logits, target, weight, ignore_index, label_smoothing, reduction, z_loss)
    terms = Terms(ignore_index, label_smoothing, z_loss)
    loss, lses, _, _ = _run_forward(logits, target.contiguous(), weight, terms, reduction, False, True)
    return loss, lses  # type: ignore[return-value]


def _fake_forward(
    logits: Any,
    target: Any,
    weight: Any,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    z_loss: float,
) -> Any:
    shape = logits.shape[:1] if reduction == "none" else ()
    return logits.new_empty(shape), logits.new_empty(logits.shape[:1], dtype=wide_dtype(logits.dtype))


def _op_backward(
    upstream: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    lses: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    z_loss: float,
) -> torch.Tensor:
    target = target.contiguous()
    terms = Terms(ignore_index, label_smoothing, z_loss)
    common = shared(target, weight, terms, reduction == "mean", logits)
    gradient = dense(logits)
    rows_gradient(logits, target, common, lses, upstream, gradient)
    return gradient


def _fake_backward(upstream: Any, logits: Any, *_: Any) -> Any:
    return logits.new_empty(logits.shape)


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    logits, target, weight, *ctx.options = inputs
    ctx.save_for_backward(logits, target, weight, output[1])


def _differentiate(ctx: Any, upstream: Any, _: Any) -> Any:
    gradient = cross_entropy_backward(upstream, *ctx.saved_tensors, *ctx.options)
    return gradient, None, None, None, None, None, None


cross_entropy_backward = register(
    "cross_entropy_backward(Tensor upstream, Tensor logits, Tensor target, Tensor? weight, Tensor lses, "
    "int ignore_index, float label_smoothing, str reduction, float z_loss) -> Tensor",
    _op_backward,
    _fake_backward,
)
cross_entropy_forward = register(
    "cross_entropy_forward(Tensor logits, Tensor target, Tensor? weight, int ignore_index, "
    "float label_smoothing, str reduction, float z_loss) -> (Tensor, Tensor)",
    _op_forward,
    _fake_forward,
    _differentiate,
    _remember,
)

# ---------------------------------------------------------------------------------------------
# The function that the kernel's spec names


def check_options(op: str, ignore_index: Any, label_smoothing: Any, reduction: Any, z_loss: Any) -> None:
    """The options that losses share; raises `KernelInputError`."""
    if type(ignore_index) is not int:
        refuse(op, "ignore_index", repr(ignore_index), "an integer")
    if not isinstance(label_smoothing, (int, float)) or not 0.0 <= label_smoothing <= 1.0:
        refuse(op, "label_smoothing", repr(label_smoothing), "a number from 0 to 1")
    if reduction not in REDUCTIONS:
        refuse(op, "reduction", repr(reduction), ", ".join(REDUCTIONS))
    if not isinstance(z_loss, (int, float)):
        refuse(op, "z_loss", repr(z_loss), "a number")


def check_target(op: str, target: Any, like: torch.Tensor, shape: torch.Size) -> None:
    check_tensor(op, "target", target, (torch.int64, torch.int32), at_least=0)
    check_shape(op, "target", target, shape)
    check_same_device(op, "target", target, like)


def _check(
    logits: Any,
    target: Any,
    weight: Any,
    ignore_index: Any,
    label_smoothing: Any,
    reduction: Any,
    z_loss: Any,
) -> None:
    op = "cross_entropy"
    check_tensor(op, "logits", logits, _DTYPES)
    if logits.dim() != 2 or logits.shape[1] == 0:
        refuse(op, "logits", f"of shape {tuple(logits.shape)}", "(rows, classes) with at least one class")
    check_target(op, target, logits, logits.shape[:1])
    if weight is not None:
        check_tensor(op, "weight", weight, _DTYPES)
        check_shape(op, "weight", weight, logits.shape[1:])
        check_same_device(op, "weight", weight, logits)
        if needs_grad(weight):
            raise KernelInputError(f"{op}: weight requires a gradient; supported: detach it, it has none")
    check_options(op, ignore_index, label_smoothing, reduction, z_loss)


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    z_loss: float = 0.0,
) -> torch.Tensor:
    """Cross entropy of ``logits`` (N, C) with class indices ``target`` (N,), as PyTorch's, plus a z-loss.

    bf16, fp16, fp32 or fp64; sums in fp32 (fp64 for fp64); the result has the dtype of ``logits``. Rows of
    logits may be spaced anyhow. ``z_loss * logsumexp(logits)**2`` is added to each row that counts, weighed
    like its label (Chowdhery et al. 2022, arXiv:2204.02311). A label outside of the classes that is not
    ``ignore_index`` makes the loss NaN. Differentiable once, in ``logits``.

    Raises:
        KernelInputError: an argument's device, dtype, shape or value is not supported.
    """
    if torch.compiler.is_compiling():
        loss, _ = cross_entropy_forward(
            logits, target, weight, ignore_index, label_smoothing, reduction, z_loss
        )
        return loss  # type: ignore[no-any-return]
    _check(logits, target, weight, ignore_index, label_smoothing, reduction, z_loss)
    if not target.is_contiguous():
        target = target.contiguous()
    terms = Terms(ignore_index, label_smoothing, z_loss)
    if needs_grad(logits):
        return _apply(logits, target, weight, terms, reduction)  # type: ignore[no-any-return]
    return _run_forward(logits, target, weight, terms, reduction, False, False)[0]


# ---------------------------------------------------------------------------------------------
# What tuning measures


def _work(dtype: torch.dtype, columns: int, gradient: bool = True) -> Callable[[Options], Callable[[], Any]]:
    rows = max(1024, min(65536, 2**30 // (columns * dtype.itemsize)))
    logits = torch.randn(rows, columns, dtype=dtype, device=work_device())
    target = torch.randint(0, columns, (rows,), device=work_device())

    def with_options(options: Options) -> Callable[[], Any]:
        return lambda: _run_forward(logits, target, None, Terms(), "mean", gradient, True, options)

    return with_options


def _loss_work(dtype: torch.dtype, columns: int) -> Callable[[Options], Callable[[], Any]]:
    return _work(dtype, columns, False)


_SIZES = tuple((width,) for width in (1024, 4096, 8192, 16384, 32000, 50304, 65536, 128256, 256000))
WORKLOADS = [Workload(options_of, _SIZES, _work), Workload(loss_options, _SIZES, _loss_work)]
