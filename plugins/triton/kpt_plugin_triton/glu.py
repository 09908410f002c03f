"""glu: activation(gate) * up in one launch, with gradients.

Reference: Shazeer 2020, arXiv:2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from kpt_plugin_triton.activations import DTYPES, check_activation, tile, wide_of
from kpt_plugin_triton.checks import check_same_device, check_shape, check_tensor
from kpt_plugin_triton.kernels import glu as device
from kpt_plugin_triton.launch import Bound, Kernel, ceil_div
from kpt_plugin_triton.registration import applier, needs_grad, once_differentiable, register
from kpt_plugin_triton.rows import dense, rows_of
from kpt_plugin_triton.tuner import Workload, work_device
from kpt_plugin_triton.tuning import Options, Tuned, remembered

_forward = Kernel(device.glu_forward)
_backward = Kernel(device.glu_backward)


def _rule(itemsize: int) -> dict[str, int]:
    """Eight elements a thread: loads of 16 bytes in half precision, and many programs at a time."""
    return {"ELEMENTS": 1024, "num_warps": 4}


def _candidates(itemsize: int) -> Iterator[dict[str, int]]:
    for elements in (256, 512, 1024, 2048, 4096, 8192):
        for warps in (1, 2, 4, 8, 16):
            if 4 <= elements // (32 * warps) <= 32:
                yield {"ELEMENTS": elements, "num_warps": warps}


forward_options = Tuned("glu_forward", (), _rule, _candidates)
backward_options = Tuned("glu_backward", (), _rule, _candidates)


def _plan(
    kernel: Kernel,
    table: Tuned,
    device: int | None,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    activation: str,
    options: Options | None = None,
) -> Bound:
    if options is None:
        options = table(device, dtype.itemsize)
    each, block = tile(options["ELEMENTS"], columns)
    grid = ceil_div(rows, each) * ceil_div(columns, block), 1, 1
    return Bound(kernel, grid, (each, block, activation, wide_of(dtype)), options["num_warps"])


_remembered_plan = remembered(_plan)


def run_forward(
    gate: torch.Tensor, up: torch.Tensor, activation: str, options: Options | None = None
) -> torch.Tensor:
    out = dense(gate)
    elements = gate.numel()
    if elements == 0:
        return out
    if gate.is_contiguous() and up.is_contiguous():  # one long row leaves no tile half empty
        flat, other, rows, columns, stride, other_stride = gate, up, 1, elements, elements, elements
    else:
        columns = gate.shape[-1]
        flat, rows, stride = rows_of(gate)
        other, _, other_stride = rows_of(up)
        if stride == other_stride == columns:
            rows, columns, stride, other_stride = 1, elements, elements, elements
    shape = _forward, forward_options, gate.device.index, gate.dtype, rows, columns, activation
    plan = _remembered_plan(*shape) if options is None else _plan(*shape, options)
    plan.start(flat, other, out, rows, columns, stride, other_stride)
    return out


def run_backward(
    gate: torch.Tensor,
    up: torch.Tensor,
    dout: torch.Tensor,
    activation: str,
    into: tuple[torch.Tensor, torch.Tensor] | None = None,
    want_hidden: bool = False,
    options: Options | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """(activation(gate) * up or None, dgate, dup), the gradients written ``into`` evenly spaced rows."""
    hidden = dense(gate) if want_hidden else None
    dgate, dup = (dense(gate), dense(up)) if into is None else into
    elements = gate.numel()
    if elements == 0:
        return hidden, dgate, dup
    given = gate.is_contiguous() and up.is_contiguous() and dout.is_contiguous()
    if given and dgate.is_contiguous() and dup.is_contiguous():
        flat, other, grad, rows, columns = gate, up, dout, 1, elements
        strides = (elements,) * 5
    else:
        columns = gate.shape[-1]
        flat, rows, stride = rows_of(gate)
        other, _, other_stride = rows_of(up)
        grad, _, grad_stride = rows_of(dout)
        strides = stride, other_stride, grad_stride, rows_of(dgate)[2], rows_of(dup)[2]
        if all(each == columns for each in strides):
            rows, columns, strides = 1, elements, (elements,) * 5
    shape = _backward, backward_options, gate.device.index, gate.dtype, rows, columns, activation
    plan = _remembered_plan(*shape) if options is None else _plan(*shape, options)
    plan.start(flat, other, grad, dgate, dup, hidden, rows, columns, *strides)
    return hidden, dgate, dup


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return run_forward(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        _, dgate, dup = run_backward(gate, up, dout, ctx.activation)
        return dgate, dup, None


_apply = applier(_Glu)


# ---------------------------------------------------------------------------------------------
# What the compiler sees


def _op_glu(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    check("glu", gate, up, activation)
    return run_forward(gate, up, activation)


def _op_backward(
    gate: torch.Tensor, up: torch.Tensor, dout: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    _, dgate, dup = run_backward(gate, up, dout, activation)
    return dgate, dup


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _differentiate(ctx: Any, dout: torch.Tensor) -> Any:
    return *backward_op(*ctx.saved_tensors, dout, ctx.activation), None


backward_op = register(
    "glu_backward(Tensor gate, Tensor up, Tensor dout, str activation) -> (Tensor, Tensor)",
    _op_backward,
    lambda gate, up, dout, activation: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)),
)
glu_op = register(
    "glu(Tensor gate, Tensor up, str activation) -> Tensor",
    _op_glu,
    lambda gate, up, activation: gate.new_empty(gate.shape),
    _differentiate,
    _remember,
)

# ---------------------------------------------------------------------------------------------
# The function that the kernel's spec names


def check(op: str, gate: Any, up: Any, activation: Any) -> None:
    """Refuse, for ``op``, what the kernels do not take; raises `KernelInputError`."""
    check_activation(op, activation)
    check_tensor(op, "gate", gate, DTYPES)
    check_tensor(op, "up", up, (gate.dtype,))
    check_shape(op, "up", up, gate.shape)
    check_same_device(op, "up", up, gate)


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """``activation(gate) * up`` for tensors of one shape [..., D], contiguous.

    ``activation`` is silu (SwiGLU), gelu (GeGLU, exact), gelu_tanh or relu. bf16, fp16, fp32 or fp64,
    computed in fp32 (fp64 for fp64). Rows may be spaced anyhow, as halves of a fused product are; other
    strides are copied first. Differentiable once.

    Raises:
        KernelInputError: an argument's device, dtype or shape, or the activation, is not supported.
    """
    if torch.compiler.is_compiling():
        return glu_op(gate, up, activation)  # type: ignore[no-any-return]
    check("glu", gate, up, activation)
    if needs_grad(gate, up):
        return _apply(gate, up, activation)  # type: ignore[no-any-return]
    return run_forward(gate, up, activation)


# ---------------------------------------------------------------------------------------------
# What tuning measures


def _work(dtype: torch.dtype) -> list[torch.Tensor]:
    rows = 2**28 // (14336 * dtype.itemsize)
    return [torch.randn(rows, 14336, dtype=dtype, device=work_device()) for _ in range(3)]


def _forward_work(dtype: torch.dtype) -> Callable[[Options], Callable[[], Any]]:
    gate, up, _ = _work(dtype)
    return lambda options: lambda: run_forward(gate, up, "silu", options)


def _backward_work(dtype: torch.dtype) -> Callable[[Options], Callable[[], Any]]:
    gate, up, dout = _work(dtype)
    return lambda options: lambda: run_backward(gate, up, dout, "silu", None, False, options)


WORKLOADS = [
    Workload(forward_options, ((),), _forward_work),
    Workload(backward_options, ((),), _backward_work),
]
