"""rms_norm, add_rms_norm, layer_norm and add_layer_norm with gradients.

References: Zhang and Sennrich 2019, arXiv:1910.07467; Ba et al. 2016, arXiv:1607.06450.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton.language as tl

from kpt_plugin_triton.checks import FLOATS, check_same_device, check_shape, check_tensor, refuse
from kpt_plugin_triton.kernels import norms as device
from kpt_plugin_triton.launch import Kernel, architecture, ceil_div, power_of_two, processors
from kpt_plugin_triton.registration import applier, needs_grad, register
from kpt_plugin_triton.rows import dense, rows_of, wide_dtype
from kpt_plugin_triton.tuner import Workload, work_device
from kpt_plugin_triton.tuning import Options, Tuned, remembered

#: Bytes of one row, and columns of one row in the backward pass, that still go into registers as a whole.
_LONGEST = 65536
_LONGEST_BACKWARD = 8192
_LONG_BLOCK = 4096
#: Bytes of shared memory for rows on their way where nothing was measured: every NVIDIA chip has so many.
_ON_THE_WAY = 98304
_DTYPES = (*FLOATS, torch.float64)

_forward = Kernel(device.norm_forward)
_forward_long = Kernel(device.norm_forward_long)
_backward = Kernel(device.norm_backward)
_backward_long = Kernel(device.norm_backward_long)
_weight_sums = Kernel(device.norm_weight_sums)
_column_sums = Kernel(device.column_sums)


def _forward_rule(itemsize: int, columns: int) -> dict[str, int]:
    block = power_of_two(columns)
    return {
        "ROWS": max(1, min(32, 4096 // block)),
        "num_warps": max(1, min(16, block * itemsize // 1024)) if block > 1024 else 4,
    }


def _backward_rule(itemsize: int, columns: int) -> dict[str, int]:
    block = power_of_two(columns)
    return {
        "ROWS": max(1, min(16, 2048 // block)),
        "PROGRAMS": 2 if block > 2048 else 4,
        "num_warps": max(4, min(16, block // 512)),
        "STAGES": 0,  # as the chip allows, see `_stages`
    }


def _forward_candidates(itemsize: int, columns: int) -> Iterator[dict[str, int]]:
    block = power_of_two(columns)
    for rows in (1, 2, 4, 8, 16, 32):
        for warps in (1, 2, 4, 8, 16, 32):
            if 8 <= rows * block // (32 * warps) <= 128:
                yield {"ROWS": rows, "num_warps": warps}
    if columns >= 2048:  # ROWS = 0: rows are read twice
        for each in (1024, 2048, 4096):
            for warps in (4, 8, 16):
                if each <= columns and 4 <= each // (32 * warps) <= 32:
                    yield {"ROWS": 0, "BLOCK": each, "num_warps": warps}


def _backward_candidates(itemsize: int, columns: int) -> Iterator[dict[str, int]]:
    block = power_of_two(columns)
    for rows in (1, 2, 4, 8, 16):
        for warps in (2, 4, 8, 16, 32):
            if 4 <= rows * block // (32 * warps) <= 32:
                for programs in (1, 2, 3, 4, 6, 8):
                    for stages in (1, 3):
                        held = (stages - 1) * 2 * rows * block * itemsize * programs
                        if warps * programs <= 48 and held <= 2 * _ON_THE_WAY:
                            yield {"ROWS": rows, "PROGRAMS": programs, "num_warps": warps, "STAGES": stages}


def _centred_rule(itemsize: int, columns: int) -> dict[str, int]:
    """Where layer_norm was never measured, what rms_norm was: 128 registers hold half as many of its rows."""
    found = dict(_backward_rule(itemsize, columns))
    if found["num_warps"] >= 16 and found["ROWS"] * power_of_two(columns) >= 32 * 32 * found["num_warps"]:
        found["ROWS"] = max(1, found["ROWS"] // 2)
    return found


forward_options = Tuned("norm_forward", ("columns",), _forward_rule, _forward_candidates)
backward_options = Tuned("norm_backward", ("columns",), _backward_rule, _backward_candidates)
centred_forward_options = Tuned("layer_norm_forward", ("columns",), _forward_rule, _forward_candidates)
centred_backward_options = Tuned("layer_norm_backward", ("columns",), _centred_rule, _backward_candidates)


class _Plan(NamedTuple):
    """A launch but for its arguments."""

    kernel: Kernel
    grid: tuple[int, int, int]
    constants: tuple[Any, ...]
    num_warps: int


def _accumulator(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _plan_forward(
    device: int | None,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    centred: bool,
    statistics: bool,
    added: bool,
    options: Options | None = None,
) -> _Plan:
    """``added``: whether there is a residual, of which each column would be read twice as well."""
    rest = centred, statistics, _accumulator(dtype)
    if columns * dtype.itemsize > _LONGEST:
        return _Plan(_forward_long, (rows, 1, 1), (columns, _LONG_BLOCK, 1, *rest), 8)
    if options is None:
        table = centred_forward_options if centred else forward_options
        options = table(device, dtype.itemsize, columns)
    if options["ROWS"] == 0 and added:
        options = _forward_rule(dtype.itemsize, columns)
    each = options["ROWS"]
    if each == 0:
        constants = (columns, options["BLOCK"], 1, *rest)
        return _Plan(_forward_long, (rows, 1, 1), constants, options["num_warps"])
    constants = (columns, power_of_two(columns), each, *rest)
    return _Plan(_forward, (ceil_div(rows, each), 1, 1), constants, options["num_warps"])


def _stages(device: int | None, itemsize: int, elements: int) -> int:
    """How many tiles of so many elements the backward pass has under way where nothing was measured.

    On NVIDIA's chips it is the one that is worked on and two more, of x, dy and a residual's gradient.
    """
    fits = 3 * 2 * elements * itemsize <= _ON_THE_WAY
    return 3 if fits and architecture(device).startswith("sm_") else 1


class _BackwardPlan(NamedTuple):
    """The launch for dx (which leaves partial sums, unless ``sums`` does), and the one that adds them up."""

    main: _Plan
    sums: _Plan | None
    programs: int
    total: _Plan


def _plan_backward(
    device: int | None,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    centred: bool,
    options: Options | None = None,
) -> _BackwardPlan:
    wide = _accumulator(dtype)
    total = _Plan(_column_sums, (ceil_div(columns, 32), 1, 1), (columns, 32, 64, wide), 8)
    if columns > _LONGEST_BACKWARD:
        programs = min(rows, 32)
        main = _Plan(_backward_long, (rows, 1, 1), (columns, _LONG_BLOCK, centred, wide), 8)
        grid = ceil_div(columns, 512), programs, 1
        return _BackwardPlan(
            main, _Plan(_weight_sums, grid, (columns, 512, centred, wide), 4), programs, total
        )
    if options is None:
        table = centred_backward_options if centred else backward_options
        options = table(device, dtype.itemsize, columns)
    each = options["ROWS"]
    programs = min(ceil_div(rows, each), options["PROGRAMS"] * processors(device))
    block = power_of_two(columns)
    stages = options.get("STAGES", 1) or _stages(device, dtype.itemsize, each * block)
    constants = (columns, block, each, centred, wide, stages)
    return _BackwardPlan(
        _Plan(_backward, (programs, 1, 1), constants, options["num_warps"]), None, programs, total
    )


_forward_plan = remembered(_plan_forward)
_backward_plan = remembered(_plan_backward)


def _run_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
    statistics: bool,
    options: Any = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(y, x + residual, mean, rstd); the last two are [rows] in fp32, and None unless asked for."""
    columns = x.shape[-1]
    y = dense(x)
    total = None if residual is None else dense(x)
    flat, rows, stride = rows_of(x)
    mean = rstd = None
    if statistics:
        wide = wide_dtype(x.dtype)
        rstd = x.new_empty(rows, dtype=wide)
        if centred:
            mean = x.new_empty(rows, dtype=wide)
    if rows == 0:
        return y, total, mean, rstd
    other, other_stride = None, 0
    if residual is not None:
        other, _, other_stride = rows_of(residual)
    shape = x.device.index, x.dtype, rows, columns, centred, statistics, residual is not None
    plan = _forward_plan(*shape) if options is None else _plan_forward(*shape, options)
    plan.kernel(
        plan.grid,
        (flat, other, weight, bias, y, total, mean, rstd, rows, stride, other_stride, eps, offset),
        plan.constants,
        plan.num_warps,
    )
    return y, total, mean, rstd


def _run_backward(
    x: torch.Tensor,
    dy: torch.Tensor,
    dtotal: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    want_weight: bool,
    want_bias: bool,
    options: Any = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(dx, dweight, dbias); ``x`` is what was normalised, the sum where a residual was added."""
    columns = x.shape[-1]
    dx = dense(x)
    flat, rows, stride = rows_of(x)
    grad, _, grad_stride = rows_of(dy)
    more, more_stride = None, 0
    if dtotal is not None:
        more, _, more_stride = rows_of(dtotal)
    dweight = torch.empty_like(weight) if want_weight and weight is not None else None
    dbias = torch.empty_like(bias) if want_bias and bias is not None else None
    if rows == 0:
        return dx, None if dweight is None else dweight.zero_(), None if dbias is None else dbias.zero_()
    shape = x.device.index, x.dtype, rows, columns, mean is not None
    plan = _backward_plan(*shape) if options is None else _plan_backward(*shape, options)
    weight_sums = bias_sums = None
    if dweight is not None:
        weight_sums = rstd.new_empty((plan.programs, columns))
    if dbias is not None:
        bias_sums = rstd.new_empty((plan.programs, columns))
    main = plan.main
    if plan.sums is None:
        main.kernel(
            main.grid,
            (
                *(flat, grad, more, weight, mean, rstd, dx, weight_sums, bias_sums),
                *(rows, stride, grad_stride, more_stride, offset),
            ),
            main.constants,
            main.num_warps,
        )
    else:
        main.kernel(
            main.grid,
            (flat, grad, more, weight, mean, rstd, dx, stride, grad_stride, more_stride, offset),
            main.constants,
            main.num_warps,
        )
        if dweight is not None or dbias is not None:
            plan.sums.kernel(
                plan.sums.grid,
                (flat, grad, mean, rstd, weight_sums, bias_sums, rows, stride, grad_stride),
                plan.sums.constants,
                plan.sums.num_warps,
            )
    if dweight is not None or dbias is not None:
        plan.total.kernel(
            plan.total.grid,
            (weight_sums, bias_sums, dweight, dbias, plan.programs),
            plan.total.constants,
            plan.total.num_warps,
        )
    return dx, dweight, dbias


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
        y, total, mean, rstd = _run_forward(x, residual, weight, bias, eps, offset, centred, True)
        # statistics are no inputs or outputs, so that plain attributes may hold them
        ctx.held = mean, rstd, offset
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
        mean, rstd, offset = ctx.held
        _, residual, wants_weight, wants_bias, _ = ctx.needs_input_grad
        if dy is None:
            dy = torch.zeros_like(x)
        dx, dweight, dbias = _run_backward(
            x, dy, dtotal, weight, bias, mean, rstd, offset, wants_weight, wants_bias
        )
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
    y, total, mean, rstd = _run_forward(x, residual, weight, bias, eps, offset, centred, True)
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
    dx, dweight, dbias = _run_backward(x, dy, dtotal, weight, bias, mean, rstd, offset, True, True)
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
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_tensor(op, name, vector, _DTYPES)
            check_shape(op, name, vector, x.shape[-1:])
            check_same_device(op, name, vector, x)


def _norm(
    op: str, x: Any, residual: Any, weight: Any, bias: Any, eps: float, offset: float, centred: bool
) -> Any:
    if torch.compiler.is_compiling():
        y, total, _, _ = norm_forward(x, residual, weight, bias, eps, offset, centred)
        return y if residual is None else (y, total)
    _check(op, x, residual, weight, bias)
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if needs_grad(x, residual, weight, bias):
        return _apply(x, residual, weight, bias, (eps, offset, centred))
    y, total, _, _ = _run_forward(x, residual, weight, bias, eps, offset, centred, False)
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
            return lambda: _run_forward(x, None, weight, bias, 1e-6, 0.0, centred, True, options)

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
            return lambda: _run_backward(x, dy, None, weight, bias, mean, rstd, 0.0, True, centred, options)

        return with_options

    return prepare


_WIDTHS = (128, 512, 768, 1024, 2048, 4096, 5120, 8192)
WORKLOADS = [
    Workload(forward_options, tuple((width,) for width in (*_WIDTHS, 16384)), _forward_work(False)),
    Workload(backward_options, tuple((width,) for width in _WIDTHS), _backward_work(False)),
    Workload(centred_forward_options, tuple((width,) for width in (*_WIDTHS, 16384)), _forward_work(True)),
    Workload(centred_backward_options, tuple((width,) for width in _WIDTHS), _backward_work(True)),
]
