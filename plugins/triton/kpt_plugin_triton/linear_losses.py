"""linear_cross_entropy: the loss of a vocabulary projection without its logits.

Rows go through in chunks. The logits of a chunk are a product of the library (which is faster than a kernel
of our own), `loss_rows.rows_forward` turns them into their gradient in place, and two more products take the
gradient to the hidden states and add it to the weight's. These gradients are computed in the forward pass
for an upstream gradient of 1, and scaled in the backward pass if it is not. With ``reduction="none"``, where
each row has an upstream gradient of its own, the backward pass computes the logits once more.

The idea is Wijmans et al.'s 2024, arXiv:2411.09009, and Hsu et al.'s 2024, arXiv:2410.10989.
"""

from __future__ import annotations

from typing import Any

import torch

from kpt_plugin_triton.checks import FLOATS, check_same_device, check_shape, check_tensor, refuse
from kpt_plugin_triton.kernels.losses_backward import scale_in_place
from kpt_plugin_triton.launch import Kernel, ceil_div, processors
from kpt_plugin_triton.linear_loss_chunks import run_backward, run_forward
from kpt_plugin_triton.loss_rows import Terms, accumulator
from kpt_plugin_triton.losses import check_options, check_target
from kpt_plugin_triton.registration import applier, needs_grad, once_differentiable, register
from kpt_plugin_triton.rows import wide_dtype

_DTYPES = (*FLOATS, torch.float64)

_scale = Kernel(scale_in_place)


def scaled_in_place(values: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply contiguous ``values`` by a number on the device; costs no memory traffic if that is 1."""
    count = values.numel()
    if count == 0:
        return
    programs = min(ceil_div(count, 4096), 8 * processors(values.device.index))
    _scale((programs, 1, 1), (values, factor, count), (4096, accumulator(wide_dtype(values.dtype))), 4)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        bias: torch.Tensor | None,
        terms: Terms,
        reduction: str,
        at_once: int | None,
    ) -> torch.Tensor:
        wants = ctx.needs_input_grad[:2] + ctx.needs_input_grad[3:4]
        loss, lses, gradients, ctx.remaining = run_forward(
            hidden, weight, target, bias, terms, reduction, wants, at_once
        )
        ctx.save_for_backward(hidden, weight, target, bias, lses)
        ctx.gradients = None if gradients is None else gradients.results()
        ctx.terms, ctx.reduction, ctx.at_once = terms, reduction, at_once
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        hidden, weight, target, bias, lses = ctx.saved_tensors
        wants = ctx.needs_input_grad[:2] + ctx.needs_input_grad[3:4]
        if ctx.reduction == "none":
            found = run_backward(
                upstream, hidden, weight, target, bias, lses, ctx.terms, wants, ctx.at_once
            ).results()
        else:
            # Handed out once, because the caller may write to them; a second pass computes them again.
            found, ctx.gradients = ctx.gradients, None
            if found is None:
                _, _, again, _ = run_forward(
                    hidden, weight, target, bias, ctx.terms, ctx.reduction, wants, ctx.at_once
                )
                found = again.results()  # type: ignore[union-attr]
            if ctx.remaining is not None:
                upstream = upstream.to(ctx.remaining.dtype) * ctx.remaining
            for values in found:
                if values is not None:
                    scaled_in_place(values, upstream)
        dbias = None if found[2] is None else found[2].to(hidden.dtype)
        return found[0], found[1], None, dbias, None, None, None


_apply = applier(_LinearCrossEntropy)


# ---------------------------------------------------------------------------------------------
# What the compiler sees


def _three(wants: list[bool]) -> tuple[bool, bool, bool]:
    hidden, weight, bias = wants
    return hidden, weight, bias


def _op_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    softcap: float | None,
    z_loss: float,
    at_once: int | None,
    wants: list[bool],
) -> tuple[torch.Tensor, ...]:
    _check(hidden, weight, target, bias, ignore_index, label_smoothing, reduction, softcap, z_loss, at_once)
    terms = Terms(ignore_index, label_smoothing, z_loss, softcap)
    loss, lses, gradients, remaining = run_forward(
        hidden.contiguous(), weight, target.contiguous(), bias, terms, reduction, _three(wants), at_once
    )
    found = (None, None, None) if gradients is None else gradients.results()
    if remaining is None:
        remaining = torch.ones((), dtype=wide_dtype(hidden.dtype), device=hidden.device)
    rest = (hidden.new_empty(0) if value is None else value for value in found)
    no_lses = hidden.new_empty(0, dtype=wide_dtype(hidden.dtype))
    return loss, no_lses if lses is None else lses, remaining, *rest


def _fake_forward(
    hidden: Any,
    weight: Any,
    target: Any,
    bias: Any,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    softcap: Any,
    z_loss: float,
    at_once: int | None,
    wants: list[bool],
) -> Any:
    wide = wide_dtype(hidden.dtype)
    each = reduction == "none"
    found = [
        hidden.new_empty(value.shape, dtype=dtype) if given and not each else hidden.new_empty(0)
        for value, dtype, given in (
            (hidden, hidden.dtype, wants[0]),
            (weight, hidden.dtype, wants[1]),
            (bias, wide, bias is not None and wants[2]),
        )
    ]
    return (
        hidden.new_empty(hidden.shape[:1] if each else ()),
        hidden.new_empty(hidden.shape[:1] if each and any(wants) else (0,), dtype=wide),
        hidden.new_empty((), dtype=wide),
        *found,
    )


def _op_backward(
    upstream: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    lses: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    at_once: int | None,
    wants: list[bool],
) -> tuple[torch.Tensor, ...]:
    terms = Terms(ignore_index, label_smoothing, z_loss, softcap)
    found = run_backward(
        upstream, hidden.contiguous(), weight, target.contiguous(), bias, lses, terms, _three(wants), at_once
    )
    return tuple(
        hidden.new_empty(0) if value is None else value.to(hidden.dtype) for value in found.results()
    )


def _fake_backward(
    upstream: Any, hidden: Any, weight: Any, target: Any, bias: Any, lses: Any, *options: Any
) -> Any:
    return tuple(
        hidden.new_empty(value.shape if value is not None and wanted else (0,))
        for value, wanted in zip((hidden, weight, bias), options[-1])
    )


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    hidden, weight, target, bias, *ctx.options, ctx.wants = inputs
    _, lses, *rest = output
    ctx.each, ctx.dtype = ctx.options[2] == "none", hidden.dtype
    ctx.set_materialize_grads(False)
    if ctx.each:
        ctx.save_for_backward(hidden, weight, target, bias, lses)
    else:
        ctx.save_for_backward(*rest)


def _differentiate(ctx: Any, upstream: Any, *_: Any) -> Any:
    nothing = (None,) * 7
    if upstream is None:
        return None, None, None, None, *nothing
    if ctx.each:
        ignore_index, smoothing, _reduction, softcap, z_loss, at_once = ctx.options
        found = linear_cross_entropy_backward(
            upstream, *ctx.saved_tensors, ignore_index, smoothing, softcap, z_loss, at_once, ctx.wants
        )
    else:
        remaining, *found = ctx.saved_tensors
        # one rounding, after a product in the wide dtype; the compiler fuses the three
        factor = upstream.to(remaining.dtype) * remaining
        found = [(value.to(remaining.dtype) * factor).to(ctx.dtype) for value in found]
    hidden, weight, bias = (value if wanted else None for value, wanted in zip(found, ctx.wants))
    return hidden, weight, None, bias, *nothing


linear_cross_entropy_backward = register(
    "linear_cross_entropy_backward(Tensor upstream, Tensor hidden, Tensor weight, Tensor target, "
    "Tensor? bias, Tensor lses, int ignore_index, float label_smoothing, float? softcap, float z_loss, "
    "int? at_once, bool[] wants) -> (Tensor, Tensor, Tensor)",
    _op_backward,
    _fake_backward,
)
linear_cross_entropy_forward = register(
    "linear_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, "
    "int ignore_index, float label_smoothing, str reduction, float? softcap, float z_loss, "
    "int? at_once, bool[] wants) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _op_forward,
    _fake_forward,
    _differentiate,
    _remember,
)

# ---------------------------------------------------------------------------------------------
# The function that the kernel's spec names


def _check(
    hidden: Any,
    weight: Any,
    target: Any,
    bias: Any,
    ignore_index: Any,
    label_smoothing: Any,
    reduction: Any,
    softcap: Any,
    z_loss: Any,
    rows_at_once: Any,
) -> None:
    op = "linear_cross_entropy"
    check_tensor(op, "hidden", hidden, _DTYPES, at_least=2)
    check_tensor(op, "weight", weight, (hidden.dtype,))
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or 0 in weight.shape:
        refuse(op, "weight", f"of shape {tuple(weight.shape)}", f"(classes, {hidden.shape[-1]}), not empty")
    check_same_device(op, "weight", weight, hidden)
    check_target(op, target, hidden, hidden.shape[:-1])
    if bias is not None:
        check_tensor(op, "bias", bias, (hidden.dtype,))
        check_shape(op, "bias", bias, weight.shape[:1])
        check_same_device(op, "bias", bias, hidden)
    check_options(op, ignore_index, label_smoothing, reduction, z_loss)
    if softcap is not None and not (isinstance(softcap, (int, float)) and softcap > 0):
        refuse(op, "softcap", repr(softcap), "None or a positive number")
    if rows_at_once is not None and not (type(rows_at_once) is int and rows_at_once > 0):
        refuse(op, "rows_at_once", repr(rows_at_once), "None or a positive integer")


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    z_loss: float = 0.0,
    rows_at_once: int | None = None,
) -> torch.Tensor:
    """The cross entropy of ``hidden`` [..., H] @ ``weight`` [V, H].T + ``bias`` [V] with ``target`` [...].

    All floating-point arguments have one dtype: bf16, fp16, fp32 or fp64; so has the result, a scalar or
    [...] with ``reduction="none"``, as ``F.cross_entropy`` of ``F.linear`` has. (Code that casts logits to
    fp32, and Liger-Kernel's function of this kind, give fp32 losses; gradients do not depend on it.) Logits
    are rounded to that dtype, sums are kept in fp32 (fp64 for fp64) and rounded once.
    ``softcap`` replaces logits by ``softcap * tanh(logits / softcap)``; the other options are those of
    `kpt_plugin_triton.losses.cross_entropy`. ``rows_at_once`` is how many rows of logits exist at a time
    (by default what half precision can do with little error): fewer take less memory, and round the
    weight's gradient more often. Differentiable once, in ``hidden``, ``weight`` and ``bias``.

    Raises:
        KernelInputError: an argument's device, dtype, shape or value is not supported.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling:
        _check(
            *(hidden, weight, target, bias, ignore_index, label_smoothing, reduction, softcap, z_loss),
            rows_at_once,
        )
    rows = hidden.reshape(-1, hidden.shape[-1])
    labels = target.reshape(-1)
    if compiling:
        wants = [needs_grad(value) for value in (hidden, weight, bias)]
        loss = linear_cross_entropy_forward(
            *(rows, weight, labels, bias, ignore_index, label_smoothing, reduction, softcap, z_loss),
            rows_at_once,
            wants,
        )[0]
    else:
        if not labels.is_contiguous():
            labels = labels.contiguous()
        terms = Terms(ignore_index, label_smoothing, z_loss, softcap)
        if needs_grad(hidden, weight, bias):
            loss = _apply(rows, weight, labels, bias, terms, reduction, rows_at_once)
        else:
            with torch.no_grad():
                loss = run_forward(rows, weight, labels, bias, terms, reduction, (False,) * 3, rows_at_once)[
                    0
                ]
    return loss.reshape(target.shape) if reduction == "none" else loss  # type: ignore[no-any-return]
