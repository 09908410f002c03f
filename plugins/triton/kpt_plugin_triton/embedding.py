"""embedding_sum_norm: three embeddings summed and layer-normalised in one launch, with gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from kpt_plugin_triton import norm_rows, norms
from kpt_plugin_triton.activations import DTYPES, wide_of
from kpt_plugin_triton.checks import check_same_device, check_shape, check_tensor, check_weights, refuse
from kpt_plugin_triton.kernels import embedding as device
from kpt_plugin_triton.launch import Kernel, ceil_div, power_of_two
from kpt_plugin_triton.registration import applier, needs_grad, once_differentiable, register
from kpt_plugin_triton.rows import contiguous, wide_dtype
from kpt_plugin_triton.tuner import Workload, work_device
from kpt_plugin_triton.tuning import Options, Tuned

_OP = "embedding_sum_norm"
#: Columns that still go into registers as a whole.
_WIDEST = 16384
_IDS = (torch.int64, torch.int32)

_forward = Kernel(device.embedding_sum_norm)


def _rule(itemsize: int, columns: int) -> dict[str, int]:
    block = power_of_two(columns)
    return {"ROWS": max(1, min(16, 2048 // block)), "num_warps": max(4, min(16, block // 512))}


def _candidates(itemsize: int, columns: int) -> Iterator[dict[str, int]]:
    block = power_of_two(columns)
    for rows in (1, 2, 4, 8, 16):
        for warps in (1, 2, 4, 8, 16):
            if 8 <= rows * block // (32 * warps) <= 64:
                yield {"ROWS": rows, "num_warps": warps}


options_of = Tuned(_OP, ("columns",), _rule, _candidates)


def _repeated(numbers: torch.Tensor | None, shape: torch.Size) -> torch.Tensor | None:
    """Contiguous numbers whose repetition fills ``shape``: of its last dimensions where that suffices."""
    if numbers is None:
        return None
    while numbers.dim() and numbers.shape[0] == 1:
        numbers = numbers[0]
    if numbers.shape != shape[len(shape) - numbers.dim() :]:
        numbers = numbers.expand(shape)
    return numbers.contiguous()


def _run(
    ids: torch.Tensor,
    words: torch.Tensor,
    position_ids: torch.Tensor | None,
    positions: torch.Tensor | None,
    type_ids: torch.Tensor | None,
    types: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    keep: bool,
    options: Options | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(y, the sum, mean, rstd); the last three are None unless they are to be kept."""
    columns, rows = words.shape[1], ids.numel()
    y = words.new_empty((*ids.shape, columns))
    total = mean = rstd = None
    if keep:
        total = torch.empty_like(y)
        wide = wide_dtype(words.dtype)
        mean, rstd = (torch.empty(rows, dtype=wide, device=words.device) for _ in range(2))
    if rows == 0:
        return y, total, mean, rstd
    if options is None:
        options = options_of(words.device.index, words.element_size(), columns)
    held: list[Any] = []
    counts, strides, periods = [words.shape[0]], [_rows(words).stride(0)], []
    for table, numbers in ((positions, position_ids), (types, type_ids)):
        if table is None:
            held += [None, None]
            counts.append(0)
            strides.append(0)
            periods.append(1)
        else:
            numbers = _repeated(numbers, ids.shape)
            held += [_rows(table), numbers]
            counts.append(table.shape[0])
            strides.append(held[-2].stride(0))
            periods.append(1 if numbers is None else numbers.numel())
    each = options["ROWS"]
    _forward(
        (ceil_div(rows, each), 1, 1),
        (
            *(_rows(words), ids.contiguous(), *held, weight, bias, y, total, mean, rstd, rows),
            *counts,
            *strides,
            *periods,
            eps,
        ),
        (columns, power_of_two(columns), each, wide_of(words.dtype)),
        options["num_warps"],
    )
    return y, total, mean, rstd


def _rows(table: torch.Tensor) -> torch.Tensor:
    return table if table.stride(1) == 1 else table.contiguous()


def _of_table(
    dtotal: torch.Tensor, numbers: torch.Tensor, entries: int, padding_idx: int | None
) -> torch.Tensor:
    """The gradient of a table whose rows ``numbers``, repeated, were added; torch sorts and sums them."""
    repeated = _repeated(numbers, dtotal.shape[:-1])
    if repeated is None:
        raise ValueError("a table needs its numbers")
    period, rows = repeated.numel(), dtotal.shape[:-1].numel()
    copies = rows // period if period else 1
    grad = dtotal.reshape(copies, *repeated.shape, dtotal.shape[-1])
    grad = grad.sum(0) if grad.shape[0] != 1 else grad[0]
    return torch.ops.aten.embedding_dense_backward(  # type: ignore[no-any-return]
        grad, repeated, entries, -1 if padding_idx is None else padding_idx, False
    )


def _gradients(
    saved: tuple[torch.Tensor | None, ...],
    dtotal: torch.Tensor,
    padding_idx: int | None,
    wants: tuple[bool, ...],
) -> list[torch.Tensor | None]:
    """Of words, positions and types, where wanted; ``saved`` are their numbers and the tables."""
    found: list[torch.Tensor | None] = []
    for (numbers, table), padding, want in zip(
        (saved[0:2], saved[2:4], saved[4:6]), (padding_idx, None, None), wants
    ):
        if not want or numbers is None or table is None:
            found.append(None)
        else:
            found.append(_of_table(dtotal, numbers, table.shape[0], padding))
    return found


class _EmbeddingSumNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ids: torch.Tensor,
        words: torch.Tensor,
        position_ids: torch.Tensor | None,
        positions: torch.Tensor | None,
        type_ids: torch.Tensor | None,
        types: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        how: tuple[float, int | None],
    ) -> torch.Tensor:
        tables = ids, words, position_ids, positions, type_ids, types
        y, total, mean, rstd = _run(*tables, weight, bias, how[0], True)
        ctx.save_for_backward(*tables, weight, bias)
        ctx.held, ctx.padding_idx = (total, mean, rstd), how[1]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        *saved, weight, bias = ctx.saved_tensors
        wants = ctx.needs_input_grad
        total, mean, rstd = ctx.held
        dtotal, dweight, dbias = norm_rows.run_backward(
            total, dy, None, weight, bias, mean, rstd, 0.0, wants[6], wants[7]
        )
        of_tables = (wants[1], wants[3], wants[5])
        words, positions, types = _gradients(tuple(saved), dtotal, ctx.padding_idx, of_tables)
        return None, words, None, positions, None, types, dweight, dbias, None


_apply = applier(_EmbeddingSumNorm)


# ---------------------------------------------------------------------------------------------
# What the compiler sees


def _op(
    ids: torch.Tensor,
    words: torch.Tensor,
    position_ids: torch.Tensor | None,
    positions: torch.Tensor | None,
    type_ids: torch.Tensor | None,
    types: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    padding_idx: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    arguments = ids, words, position_ids, positions, type_ids, types
    _check(*arguments, weight, bias)
    return _run(*arguments, contiguous(weight), contiguous(bias), eps, True)  # type: ignore[return-value]


def _fake(ids: Any, words: Any, *_: Any) -> Any:
    y = words.new_empty((*ids.shape, words.shape[1]))
    statistics = (words.new_empty(ids.numel(), dtype=wide_dtype(words.dtype)) for _ in range(2))
    return y, torch.empty_like(y), *statistics


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    *tables, weight, bias, _, ctx.padding_idx = inputs
    ctx.save_for_backward(*tables, weight, bias, *output[1:])


def _differentiate(ctx: Any, dy: torch.Tensor, *_: Any) -> Any:
    *saved, weight, bias, total, mean, rstd = ctx.saved_tensors
    dtotal, dweight, dbias = norms.norm_backward(total, dy, None, weight, bias, mean, rstd, 0.0)
    words, positions, types = _gradients(tuple(saved), dtotal, ctx.padding_idx, (True, True, True))
    weights = (None if weight is None else dweight), (None if bias is None else dbias)
    return None, words, None, positions, None, types, *weights, None, None


op = register(
    "embedding_sum_norm(Tensor ids, Tensor words, Tensor? position_ids, Tensor? positions, Tensor? type_ids, "
    "Tensor? types, Tensor? weight, Tensor? bias, float eps, int? padding_idx) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _op,
    _fake,
    _differentiate,
    _remember,
)

# ---------------------------------------------------------------------------------------------
# The function that the kernel's spec names


def _check(
    ids: Any,
    words: Any,
    position_ids: Any,
    positions: Any,
    type_ids: Any,
    types: Any,
    weight: Any,
    bias: Any,
) -> None:
    check_tensor(_OP, "words", words, DTYPES)
    if words.dim() != 2 or not 1 <= words.shape[1] <= _WIDEST:
        refuse(
            _OP, "words", f"of shape {tuple(words.shape)}", f"shape (entries, D) with D from 1 to {_WIDEST}"
        )
    check_tensor(_OP, "ids", ids, _IDS)
    check_same_device(_OP, "ids", ids, words)
    columns = words.shape[1]
    for name, numbers, plural, table in (
        ("position_ids", position_ids, "positions", positions),
        ("type_ids", type_ids, "types", types),
    ):
        if (numbers is None) != (table is None):
            refuse(
                _OP, name, "None" if numbers is None else "given", f"both or neither of {name} and {plural}"
            )
        if table is None:
            continue
        check_tensor(_OP, plural, table, (words.dtype,))
        check_shape(_OP, plural, table, (table.shape[0], columns))
        check_same_device(_OP, plural, table, words)
        check_tensor(_OP, name, numbers, _IDS)
        check_same_device(_OP, name, numbers, words)
        trailing = ids.shape[ids.dim() - numbers.dim() :]
        if numbers.dim() > ids.dim() or any(a not in (1, b) for a, b in zip(numbers.shape, trailing)):
            refuse(_OP, name, f"of shape {tuple(numbers.shape)}", f"what broadcasts to {tuple(ids.shape)}")
    check_weights(_OP, weight, bias, words, columns, DTYPES)


def embedding_sum_norm(
    ids: torch.Tensor,
    words: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    type_ids: torch.Tensor | None = None,
    types: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-12,
    padding_idx: int | None = None,
) -> torch.Tensor:
    """The layer norm of ``words[ids] + types[type_ids] + positions[position_ids]``, [..., D].

    ``ids`` [...] and the other numbers, which broadcast to it, are int64 or int32; tables are [entries, D],
    ``weight`` and ``bias`` [D] or None. bf16, fp16, fp32 or fp64; added and normalised in fp32 (fp64 for
    fp64). A number that is no row of its table gives a row of NaN. The row ``padding_idx`` of ``words`` gets
    no gradient. Differentiable once; the tables' gradients are summed by torch.

    Raises:
        KernelInputError: an argument's device, dtype or shape is not supported.
    """
    arguments = ids, words, position_ids, positions, type_ids, types
    if torch.compiler.is_compiling():
        return op(*arguments, weight, bias, eps, padding_idx)[0]  # type: ignore[no-any-return]
    _check(*arguments, weight, bias)
    weight, bias = contiguous(weight), contiguous(bias)
    if needs_grad(words, positions, types, weight, bias):
        return _apply(*arguments, weight, bias, (eps, padding_idx))  # type: ignore[no-any-return]
    return _run(*arguments, weight, bias, eps, False)[0]


# ---------------------------------------------------------------------------------------------
# What tuning measures


def _work(dtype: torch.dtype, columns: int) -> Callable[[Options], Callable[[], Any]]:
    where = work_device()
    words = torch.randn(30522, columns, dtype=dtype, device=where)
    places = torch.arange(512, device=where)
    ids = torch.randint(0, 30522, (64, 512), device=where)
    rest = words[0], words[0], 1e-12, False
    return lambda options: (
        lambda: _run(ids, words, places, words[:512], places % 2, words[:2], *rest, options)
    )


WORKLOADS = [Workload(options_of, ((768,), (1024,), (4096,)), _work)]
