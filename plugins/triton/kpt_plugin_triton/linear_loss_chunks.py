"""The loss of a vocabulary projection, chunk by chunk of its rows.

Memory over the inputs: the gradients themselves and one chunk of logits. The weight's gradient is a sum of
one product a chunk, rounded after each in its own dtype. In half precision the error of that sum, beside the
one of unfused bf16 code, grows with the chunks where logits are flat, as in a fresh model: 1.2 x for two,
1.5 x for four, 2 x for eight, 2.8 x for sixteen (logits of standard deviation 4: 1.01, 1.05, 1.13, 1.25;
simulated, 2048 rows). So half precision takes two chunks, or, where such chunks would be larger than a copy
of the gradient in fp32, small chunks and a sum in fp32. ``rows_at_once`` trades that error for memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kpt_plugin_triton.launch import ceil_div
from kpt_plugin_triton.loss_rows import (
    Shared,
    Terms,
    empty_loss,
    finished,
    most_programs,
    programs_for,
    rows_forward,
    rows_gradient,
    shared,
)
from kpt_plugin_triton.rows import wide_dtype

#: Bytes of one chunk of logits, unless rounding asks for larger ones.
CHUNK_BYTES = 2**28
#: Rounded products that are added up in half precision, at most, see above.
MOST_ROUNDED = 2
#: Rows of the weight's gradient that are added to a sum in fp32 at a time.
_SLICE = 8192


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


class Gradients:
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
        """Of hidden, weight and bias; the last still in fp32 (fp64), so that scaling it rounds once."""
        return (
            self.hidden,
            None if self.sum is None else self.sum.result(),
            self.bias,
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


def run_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    terms: Terms,
    reduction: str,
    wants: tuple[bool, bool, bool],
    at_once: int | None,
) -> tuple[torch.Tensor, torch.Tensor | None, Gradients | None, torch.Tensor | None]:
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
    gradients = Gradients(hidden, weight, bias, wants, wide_sum) if any(wants) and not each else None
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
            gradients = Gradients(hidden, weight, bias, wants, False)
        return empty_loss(reduction, hidden), lses, gradients, None
    partials: torch.Tensor | None = None
    done = 0
    for part, logits in _chunks(hidden, weight, bias, chunk):
        sums = None
        if not each:
            programs = programs_for(logits, common.terms, gradients is not None)
            if partials is None:
                most = most_programs(logits, gradients is not None) * ceil_div(rows, chunk)
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


def run_backward(
    upstream: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    lses: torch.Tensor,
    terms: Terms,
    wants: tuple[bool, bool, bool],
    at_once: int | None,
) -> Gradients:
    """Gradients of losses that are not reduced, from ``upstream`` [rows] and the rows' lse."""
    rows, size = hidden.shape
    chunk, wide_sum = plan(rows, size, weight.shape[0], hidden.element_size(), at_once, wants[1])
    gradients = Gradients(hidden, weight, bias, wants, wide_sum)
    common = Shared(terms, None, None, None, 0)
    if hidden.shape[0]:
        for part, logits in _chunks(hidden, weight, bias, chunk):
            rows_gradient(logits, target[part], common, lses[part], upstream[part], logits)
            gradients.add(part, logits)
    return gradients
