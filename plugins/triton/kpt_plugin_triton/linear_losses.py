"""linear_cross_entropy: the loss of a vocabulary projection without its logits.

Rows go through in chunks. The logits of a chunk are a product of the library (which is faster than a kernel
of our own), `losses.rows_forward` turns them into their gradient in place, and two more products take the
gradient to the hidden states and add it to the weight's. These gradients are computed in the forward pass
for an upstream gradient of 1, and scaled in the backward pass if it is not. With ``reduction="none"``, where
each row has an upstream gradient of its own, the backward pass computes the logits once more.

Memory over the inputs: the gradients themselves and one chunk of logits. The weight's gradient is a sum of
one product a chunk, rounded after each in its own dtype. In half precision the error of that sum, beside the
one of unfused bf16 code, grows with the chunks where logits are flat, as in a fresh model: 1.2 x for two,
1.5 x for four, 2 x for eight, 2.8 x for sixteen (logits of standard deviation 4: 1.01, 1.05, 1.13, 1.25;
simulated, 2048 rows). So half precision takes two chunks, or, where such chunks would be larger than a copy
of the gradient in fp32, small chunks and a sum in fp32. ``rows_at_once`` trades that error for memory.

The idea is Wijmans et al.'s 2024, arXiv:2411.09009, and Hsu et al.'s 2024, arXiv:2410.10989.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kpt_plugin_triton.checks import FLOATS, check_same_device, check_shape, check_tensor, refuse
from kpt_plugin_triton.kernels import losses as device
from kpt_plugin_triton.launch import Kernel, ceil_div, processors
from kpt_plugin_triton.losses import (
    Shared,
    Terms,
    accumulator,
    check_options,
    check_target,
    empty_loss,
    finished,
    programs_for,
    rows_forward,
    rows_gradient,
    shared,
)
from kpt_plugin_triton.registration import needs_grad, register
from kpt_plugin_triton.rows import wide_dtype

#: Bytes of one chunk of logits, unless rounding asks for larger ones.
CHUNK_BYTES = 2**28
#: Rounded products that are added up in half precision, at most, see above.
MOST_ROUNDED = 2
#: Rows of the weight's gradient that are added to a sum in fp32 at a time.
_SLICE = 8192
_DTYPES = (*FLOATS, torch.float64)

_scale = Kernel(device.scale_in_place)


def plan(
    rows: int, hidden: int, vocabulary: int, itemsize: int, at_once: int | None = None, summed: bool = True
) -> tuple[int, bool]:
    """(rows of a chunk, whether the weight's gradient is summed in fp32).

    ``at_once`` is what the caller wishes for, ``summed`` whether there is such a sum at all.
    """
    if at_once is not None:
        return max(1, min(at_once, rows)), False
    chunk = CHUNK_BYTES // (vocabulary * itemsize)
    # full tiles for the products
    chunk = max(128, chunk // 128 * 128)
    if not summed or itemsize >= 4 or ceil_div(rows, chunk) <= MOST_ROUNDED:
        return min(chunk, rows), False
    larger = ceil_div(ceil_div(rows, MOST_ROUNDED), 128) * 128
    if larger * itemsize <= 4 * hidden:
        return min(larger, rows), False
    return min(max(chunk, 1024), rows), True


class _WeightSum:
    """The weight's gradient, a sum of one product a chunk."""

    def __init__(self, weight: torch.Tensor, wide: bool) -> None:
        self.weight = weight
        self.total: torch.Tensor | None = None
        self.wide = wide

    def add(self, gradient: torch.Tensor, hidden: torch.Tensor) -> None:
        """Add ``gradient`` [rows, V].T @ ``hidden`` [rows, H]."""
        first = self.total is None
        if self.total is None:
            dtype = torch.float32 if self.wide else self.weight.dtype
            self.total = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device)
        if not self.wide:
            if first:
                torch.mm(gradient.t(), hidden, out=self.total)
            else:
                torch.addmm(self.total, gradient.t(), hidden, out=self.total)
            return
        for start in range(0, len(self.total), _SLICE):
            part = gradient[:, start : start + _SLICE].t() @ hidden
            if first:
                self.total[start : start + _SLICE] = part
            else:
                self.total[start : start + _SLICE] += part

    def result(self) -> torch.Tensor:
        if self.total is None:
            return torch.zeros_like(self.weight)
        return self.total.to(self.weight.dtype)


class _Gradients:
    """The gradients that are wanted, filled chunk by chunk from that of the logits."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        wants: tuple[bool, bool, bool],
        wide: bool,
    ) -> None:
        self.inputs = hidden, weight
        self.hidden = (
            torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if wants[0] else None
        )
        self.sum = _WeightSum(weight, wide) if wants[1] else None
        self.bias = (
            torch.zeros(bias.shape, dtype=wide_dtype(bias.dtype), device=bias.device)
            if bias is not None and wants[2]
            else None
        )

    def add(self, rows: slice, gradient: torch.Tensor) -> None:
        hidden, weight = self.inputs
        if self.hidden is not None:
            torch.mm(gradient, weight, out=self.hidden[rows])
        if self.sum is not None:
            self.sum.add(gradient, hidden[rows])
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=self.bias.dtype)

    def results(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        _, weight = self.inputs
        return (
            self.hidden,
            None if self.sum is None else self.sum.result(),
            None if self.bias is None else self.bias.to(weight.dtype),
        )


def _chunks(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, chunk: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """The logits of one chunk after the other, all in the same memory."""
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    buffer = torch.empty((min(chunk, rows), vocabulary), dtype=hidden.dtype, device=hidden.device)
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        logits = buffer[: part.stop - part.start]
        if bias is None:
            torch.mm(hidden[part], weight.t(), out=logits)
        else:
            torch.addmm(bias, hidden[part], weight.t(), out=logits)
        yield part, logits


def _run_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    terms: Terms,
    reduction: str,
    wants: tuple[bool, bool, bool],
    at_once: int | None,
) -> tuple[torch.Tensor, torch.Tensor | None, _Gradients | None, torch.Tensor | None]:
    """(loss, lse of each row for "none", gradients but for "none", what they are to be multiplied by).

    The last is None for 1. fp16 has no room for probabilities divided by a number of rows, so that there a
    mean's gradients are a sum's.
    """
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    chunk, wide_sum = plan(rows, hidden.shape[1], vocabulary, hidden.element_size(), at_once, wants[1])
    wide = wide_dtype(hidden.dtype)
    mean = reduction == "mean"
    common = shared(target, None, terms, mean, hidden.new_empty((0, vocabulary)))
    each = reduction == "none"
    gradients = _Gradients(hidden, weight, bias, wants, wide_sum) if any(wants) and not each else None
    remaining = None
    in_chunk = common
    if mean and gradients is not None and hidden.dtype == torch.float16:
        in_chunk = Shared(terms, None, None, None, 0)
        if common.denominators is not None:
            remaining = common.denominators.sum().reciprocal()
    losses = torch.empty(rows, dtype=hidden.dtype, device=hidden.device) if each else None
    lses = torch.empty(rows, dtype=wide, device=hidden.device) if each and any(wants) else None
    if rows == 0:
        if gradients is not None:
            gradients = _Gradients(hidden, weight, bias, wants, False)
        return empty_loss(reduction, hidden), lses, gradients, None
    partials: torch.Tensor | None = None
    done = 0
    for part, logits in _chunks(hidden, weight, bias, chunk):
        sums = None
        if not each:
            programs = programs_for(logits, len(logits))
            if partials is None:
                most = programs * ceil_div(rows, chunk)
                partials = torch.empty(most, dtype=wide, device=hidden.device)
            sums = partials[done : done + programs]
            done += programs
        rows_forward(
            logits,
            target[part],
            in_chunk,
            lses=None if lses is None else lses[part],
            losses=None if losses is None else losses[part],
            partials=sums,
            gradient=None if gradients is None else logits,
        )
        if gradients is not None:
            gradients.add(part, logits)
    if losses is not None or partials is None:
        return losses, lses, None, None  # type: ignore[return-value]
    return finished(partials[:done], common, hidden.dtype), lses, gradients, remaining


def _run_backward(
    upstream: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    lses: torch.Tensor,
    terms: Terms,
    wants: tuple[bool, bool, bool],
    at_once: int | None,
) -> _Gradients:
    """Gradients of losses that are not reduced, from ``upstream`` [rows] and the rows' lse."""
    rows, size = hidden.shape
    chunk, wide_sum = plan(rows, size, weight.shape[0], hidden.element_size(), at_once, wants[1])
    gradients = _Gradients(hidden, weight, bias, wants, wide_sum)
    common = Shared(terms, None, None, None, 0)
    if hidden.shape[0]:
        for part, logits in _chunks(hidden, weight, bias, chunk):
            rows_gradient(logits, target[part], common, lses[part], upstream[part], logits)
            gradients.add(part, logits)
    return gradients


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
        loss, lses, gradients, ctx.remaining = _run_forward(
            hidden, weight, target, bias, terms, reduction, wants, at_once
        )
        ctx.save_for_backward(hidden, weight, target, bias, lses)
        ctx.gradients = None if gradients is None else gradients.results()
        ctx.terms, ctx.reduction, ctx.at_once = terms, reduction, at_once
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        hidden, weight, target, bias, lses = ctx.saved_tensors
        wants = ctx.needs_input_grad[:2] + ctx.needs_input_grad[3:4]
        if ctx.reduction == "none":
            found = _run_backward(
                upstream, hidden, weight, target, bias, lses, ctx.terms, wants, ctx.at_once
            ).results()
        else:
            # Handed out once, because the caller may write to them; a second pass computes them again.
            found, ctx.gradients = ctx.gradients, None
            if found is None:
                _, _, again, _ = _run_forward(
                    hidden, weight, target, bias, ctx.terms, ctx.reduction, wants, ctx.at_once
                )
                found = again.results()  # type: ignore[union-attr]
            if ctx.remaining is not None:
                upstream = upstream.to(ctx.remaining.dtype) * ctx.remaining
            for values in found:
                if values is not None:
                    scaled_in_place(values, upstream)
        return found[0], found[1], None, found[2], None, None, None


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
    loss, lses, gradients, remaining = _run_forward(
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
    shapes = [
        value.shape if value is not None and wanted and not each else (0,)
        for value, wanted in zip((hidden, weight, bias), wants)
    ]
    return (
        hidden.new_empty(hidden.shape[:1] if each else ()),
        hidden.new_empty(hidden.shape[:1] if each and any(wants) else (0,), dtype=wide),
        hidden.new_empty((), dtype=wide),
        *(hidden.new_empty(shape) for shape in shapes),
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
    found = _run_backward(
        upstream, hidden.contiguous(), weight, target.contiguous(), bias, lses, terms, _three(wants), at_once
    )
    return tuple(hidden.new_empty(0) if value is None else value for value in found.results())


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
    ctx.each = ctx.options[2] == "none"
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
        found = [(value.to(remaining.dtype) * factor).to(value.dtype) for value in found]
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
    [...] with ``reduction="none"``. Logits are rounded to it, sums are kept in fp32 (fp64 for fp64).
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
            loss = _LinearCrossEntropy.apply(rows, weight, labels, bias, terms, reduction, rows_at_once)
        else:
            with torch.no_grad():
                loss = _run_forward(rows, weight, labels, bias, terms, reduction, (False,) * 3, rows_at_once)[
                    0
                ]
    return loss.reshape(target.shape) if reduction == "none" else loss  # type: ignore[no-any-return]
