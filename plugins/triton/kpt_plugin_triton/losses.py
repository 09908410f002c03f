"""cross_entropy with class weights, label smoothing, z-loss and gradients.

A call that needs a gradient computes it together with the loss, while a row is still in a cache: memory sees
the logits once and the gradient once, 2 passes where a separate backward makes 3. The gradient goes into a
buffer of its own, so that a training step takes as much memory at its peak as with a separate backward. The
upstream gradient of a scalar loss is 1 nearly always; where it is not, the backward pass computes the
gradient again, and a kernel decides that on the device, without waiting for it. With ``reduction="none"``
and inside a compiled graph the gradient is left to the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from kpt_plugin_triton.checks import (
    FLOATS,
    KernelInputError,
    check_same_device,
    check_shape,
    check_tensor,
    refuse,
)
from kpt_plugin_triton.kernels import losses as device
from kpt_plugin_triton.launch import Kernel, ceil_div, power_of_two, processors
from kpt_plugin_triton.registration import needs_grad, register
from kpt_plugin_triton.rows import dense, rows_of, wide_dtype
from kpt_plugin_triton.tuner import Workload, work_device
from kpt_plugin_triton.tuning import Options, Tuned

#: Columns of a row that still goes into registers as a whole where a table asks for that, and bytes where
#: the rule decides.
_LONGEST = 32768
_LONGEST_BY_RULE = 32768
#: Partial counts of targets, at most.
_PARTS = 64
_DTYPES = (*FLOATS, torch.float64)
REDUCTIONS = ("mean", "sum", "none")

_count = Kernel(device.count_targets)
_finish = Kernel(device.finish_loss)
_short = Kernel(device.cross_entropy_short)
_long = Kernel(device.cross_entropy_long)
_gradient = Kernel(device.cross_entropy_gradient)


def _rule(itemsize: int, columns: int) -> dict[str, int]:
    block = power_of_two(columns)
    if block * itemsize <= _LONGEST_BY_RULE:
        rows = max(1, min(32, 2048 // block))
        warps = max(4, min(16, rows * block // 1024))
        return {"ROWS": rows, "BLOCK": block, "PROGRAMS": 32 // warps, "num_warps": warps}
    # ROWS = 0: rows are read twice. One program a multiprocessor, so that the row stays in its cache.
    programs = 1 if columns * itemsize > 98304 else 2
    return {
        "ROWS": 0,
        "BLOCK": min(16384 // itemsize, block // 4),
        "PROGRAMS": programs,
        "num_warps": 16 if itemsize == 2 else 8,
    }


def _candidates(itemsize: int, columns: int) -> Iterator[dict[str, int]]:
    block = power_of_two(columns)
    for warps in (2, 4, 8, 16, 32):
        for rows in (1, 2, 4, 8, 16, 32):
            if block <= _LONGEST and 8 <= rows * block // (32 * warps) <= 64:
                for programs in (1, 2, 4, 8):
                    if warps * programs <= 64:
                        yield {"ROWS": rows, "BLOCK": block, "PROGRAMS": programs, "num_warps": warps}
        for each in (4096, 8192, 16384, 32768):
            if columns > 8192 and warps >= 8 and each <= columns and each // (32 * warps) <= 64:
                for programs in (1, 2, 3, 4):
                    if warps * programs <= 64:
                        yield {"ROWS": 0, "BLOCK": each, "PROGRAMS": programs, "num_warps": warps}


options_of = Tuned("cross_entropy", ("columns",), _rule, _candidates)


@dataclass(frozen=True)
class Terms:
    """What a row's loss is made of besides its logits and label."""

    ignore_index: int = -100
    smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None

    def arguments(self) -> tuple[int, float, float, float]:
        return self.ignore_index, float(self.smoothing), float(self.z_loss), float(self.softcap or 0.0)

    def constants(self) -> tuple[bool, bool, bool]:
        return self.smoothing != 0.0, self.z_loss != 0.0, self.softcap is not None


@dataclass(frozen=True)
class Shared:
    """What all rows of a call have in common, on the device; see `shared`."""

    terms: Terms
    weight: torch.Tensor | None
    weight_total: torch.Tensor | None
    denominators: torch.Tensor | None
    parts: int


def shared(
    target: torch.Tensor, weight: torch.Tensor | None, terms: Terms, mean: bool, like: torch.Tensor
) -> Shared:
    """Counts the targets [rows] for a mean (their weights, with class weights) and sums the class weights.

    ``like`` [rows, classes] gives the dtype and the number of classes.
    """
    wide = wide_dtype(like.dtype)
    rows, classes = target.numel(), like.shape[-1]
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()
    total = weight.sum(dtype=wide) if weight is not None and terms.smoothing else None
    if not mean or rows == 0:
        return Shared(terms, weight, total, None, 0)
    parts = min(_PARTS, ceil_div(rows, 1024))
    counts = torch.empty(parts, dtype=wide, device=target.device)
    _count(
        (parts, 1, 1),
        (target, weight, counts, rows, classes, terms.ignore_index),
        (1024, accumulator(wide)),
        4,
    )
    return Shared(terms, weight, total, counts, parts)


def accumulator(wide: torch.dtype) -> Any:
    return tl.float64 if wide is torch.float64 else tl.float32


def programs_for(logits: torch.Tensor, rows: int, options: Options | None = None) -> int:
    """How many programs `rows_forward` starts, which is the number of partial sums that it writes."""
    columns = logits.shape[-1]
    chosen = options or options_of(logits.device.index, logits.element_size(), columns)
    tiles = ceil_div(rows, max(1, chosen["ROWS"]))
    return min(tiles, chosen["PROGRAMS"] * processors(logits.device.index))


def rows_forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    common: Shared,
    *,
    lses: torch.Tensor | None = None,
    losses: torch.Tensor | None = None,
    partials: torch.Tensor | None = None,
    gradient: torch.Tensor | None = None,
    options: Options | None = None,
) -> None:
    """One launch over ``logits`` [rows, classes]; writes those of the four outputs that are given.

    ``lses`` and ``losses`` are [rows], ``partials`` [`programs_for`] sums of losses, not divided yet, and
    ``gradient`` contiguous [rows, classes], divided for a mean; it may be ``logits`` itself if that is
    contiguous. There must be at least one row.
    """
    columns, itemsize = logits.shape[-1], logits.element_size()
    flat, rows, stride = rows_of(logits)
    chosen = options or options_of(logits.device.index, itemsize, columns)
    programs = programs_for(logits, rows, chosen)
    arguments = (
        *(flat, target, common.weight, common.weight_total, common.denominators),
        *(lses, losses, partials, gradient, rows, columns, stride, common.parts),
        *common.terms.arguments(),
    )
    last = (_PARTS, *common.terms.constants(), accumulator(wide_dtype(logits.dtype)))
    block = power_of_two(columns)
    # smoothing and a soft cap take more registers for each column
    heavy = common.terms.softcap is not None or common.terms.smoothing != 0.0
    if chosen["ROWS"] and block <= _LONGEST:
        warps = min(16, 2 * chosen["num_warps"]) if heavy else chosen["num_warps"]
        _short((programs, 1, 1), arguments, (block, chosen["ROWS"], *last), warps)
    else:  # a table's options may be for somewhat longer rows
        block = min(chosen["BLOCK"], block if block == columns else block // 2, 32768)
        vector = min(16 // itemsize, block)
        even = columns % vector == 0
        warps = chosen["num_warps"]
        if not even:  # columns are loaded one by one, each with an address
            block, warps = min(block, 2048 if heavy else 4096), 16
        elif heavy:
            block = max(block // 2, vector)
            warps = max(4, min(warps, block // vector // 32))  # a vector for each thread
        _long((programs, 1, 1), arguments, (block, vector, even, *last), warps)


def rows_gradient(
    logits: torch.Tensor,
    target: torch.Tensor,
    common: Shared,
    lses: torch.Tensor,
    upstream: torch.Tensor,
    gradient: torch.Tensor,
    unless_one: bool = False,
) -> None:
    """``gradient`` [rows, classes] from logits and their lse, times ``upstream`` ([rows] or a scalar).

    With ``unless_one``, nothing happens if ``upstream`` is 1. ``gradient`` may be ``logits`` itself.
    """
    columns = logits.shape[-1]
    flat, rows, stride = rows_of(logits)
    if rows == 0:
        return
    block = min(power_of_two(columns), 4096 if columns % 16 == 0 else 1024)
    each = max(1, 2048 // power_of_two(columns))
    tiles = ceil_div(rows, each) * ceil_div(columns, block)
    programs = min(tiles, 8 * processors(logits.device.index))
    upstream_stride = upstream.stride(0) if upstream.dim() else 0
    _gradient(
        (programs, 1, 1),
        (
            *(flat, target, common.weight, common.weight_total, common.denominators, lses, upstream),
            *(gradient, rows, columns, stride, upstream_stride, common.parts),
            *common.terms.arguments(),
        ),
        (
            *(block, each, _PARTS, *common.terms.constants()),
            *(accumulator(wide_dtype(logits.dtype)), unless_one),
        ),
        4,
    )


def finished(partials: torch.Tensor, common: Shared, dtype: torch.dtype) -> torch.Tensor:
    """The scalar loss from partial sums, divided by what was counted."""
    loss = torch.empty((), dtype=dtype, device=partials.device)
    _finish(
        (1, 1, 1),
        (partials, common.denominators, loss, partials.numel(), common.parts),
        (1024, _PARTS, accumulator(partials.dtype)),
        4,
    )
    return loss


def empty_loss(reduction: str, like: torch.Tensor) -> torch.Tensor:
    """The loss of no rows, as PyTorch defines it: NaN for a mean, 0 for a sum."""
    if reduction == "none":
        return torch.empty(0, dtype=like.dtype, device=like.device)
    value = float("nan") if reduction == "mean" else 0.0
    return torch.full((), value, dtype=like.dtype, device=like.device)


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
        programs = programs_for(logits, rows, options)
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
    @torch.autograd.function.once_differentiable
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
        return _CrossEntropy.apply(logits, target, weight, terms, reduction)  # type: ignore[no-any-return]
    return _run_forward(logits, target, weight, terms, reduction, False, False)[0]


# ---------------------------------------------------------------------------------------------
# What tuning measures


def _work(dtype: torch.dtype, columns: int) -> Callable[[Options], Callable[[], Any]]:
    rows = max(1024, min(65536, 2**30 // (columns * dtype.itemsize)))
    logits = torch.randn(rows, columns, dtype=dtype, device=work_device())
    target = torch.randint(0, columns, (rows,), device=work_device())

    def with_options(options: Options) -> Callable[[], Any]:
        return lambda: _run_forward(logits, target, None, Terms(), "mean", True, True, options)

    return with_options


WORKLOADS = [
    Workload(
        options_of,
        tuple((width,) for width in (1024, 4096, 8192, 16384, 32000, 50304, 65536, 128256, 256000)),
        _work,
    )
]
