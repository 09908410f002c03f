"""activation(gate) * up, forward and backward, for rows that may be parts of wider rows."""

from __future__ import annotations

import triton
import triton.language as tl

from kpt_plugin_triton.kernels.activations import activate, activate_with_slope

#: Bytes from which on a result that stayed in the L2 cache would push out what is still to be read.
STREAMED = tl.constexpr(2**26)


@triton.jit
def glu_forward(
    gate,
    up,
    out,
    rows,
    columns,
    gate_stride,
    up_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(columns, BLOCK)
    row = ((program // blocks) * ROWS + tl.arange(0, ROWS))[:, None]
    column = ((program % blocks) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < rows) & (column < columns)
    value = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(WIDE)
    factor = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(WIDE)
    coarse: tl.constexpr = out.dtype.element_ty.primitive_bitwidth == 16
    result = (activate(value, ACTIVATION, coarse) * factor).to(out.dtype.element_ty)
    size = (rows + tl.zeros([], tl.int64)) * columns * (out.dtype.element_ty.primitive_bitwidth // 8)
    if size >= STREAMED:
        tl.store(out + row * columns + column, result, mask=inside, cache_modifier=".cs")
    else:
        tl.store(out + row * columns + column, result, mask=inside)


@triton.jit
def glu_backward(
    gate,
    up,
    dout,
    dgate,
    dup,
    hidden,
    rows,
    columns,
    gate_stride,
    up_stride,
    dout_stride,
    dgate_stride,
    dup_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dgate and dup; and in ``hidden``, unless it is None, what the forward gave."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(columns, BLOCK)
    row = ((program // blocks) * ROWS + tl.arange(0, ROWS))[:, None]
    column = ((program % blocks) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < rows) & (column < columns)
    value = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(WIDE)
    factor = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(WIDE)
    grad = tl.load(dout + row * dout_stride + column, mask=inside, other=0.0).to(WIDE)
    kind: tl.constexpr = dgate.dtype.element_ty
    result, slope = activate_with_slope(value, ACTIVATION, kind.primitive_bitwidth == 16)
    tl.store(dgate + row * dgate_stride + column, (grad * factor * slope).to(kind), mask=inside)
    tl.store(dup + row * dup_stride + column, (grad * result).to(kind), mask=inside)
    if hidden is not None:
        tl.store(hidden + row * columns + column, (result * factor).to(kind), mask=inside)
