"""Products of at most 16 rows with a weight [N, K]: the weight is read once, and reading it is all the time.

One row needs no matrix units (`skinny_vector`); up to 16 rows are one tile of them (`skinny_dot`). Where N is
too small to give every multiprocessor a program, K is split, and `skinny_sum` adds the parts up in order.

EARLY: programs are started while the kernel before still runs, and wait until it has ended and what it wrote
can be read: a 4096x4096 weight takes 8 µs to read, and one to start a kernel. Meanwhile `skinny_dot` may have
the second-level cache fetch the weight's first columns, EARLY blocks of them; should the kernel before write
these, it writes them there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kpt_plugin_triton.kernels.activations import activate


@triton.jit
def fp8_values(code, BIAS: tl.constexpr):
    """fp16 values of fp8 bits (uint8) with 4 bits of exponent, divided by ``2 ** (15 - BIAS)``; exact.

    BIAS 7 is e4m3fn, 8 e4m3fnuz. For GPUs that cannot convert this type themselves: the exponent moves to
    fp16's place, and the difference of the two biases is left to the caller's scale.
    """
    wide = code.to(tl.int16)
    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    if BIAS == 7:
        bits = tl.where((wide & 0x7F) == 0x7F, 0x7E00, bits)
    else:
        bits = tl.where(wide == 0x80, 0x7E00, bits)
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _fetch(places):
    """Have NVIDIA's second-level cache fetch the lines that hold these addresses."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [places], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def finished(total, scale, bias, feature, inside, scale_stride, BIAS: tl.constexpr, ACTIVATION: tl.constexpr):
    """Sums (``feature``'s shape at the end) with the weight's scale, a bias and an activation."""
    if scale is not None:
        factor = tl.load(scale + feature * scale_stride, mask=inside, other=0.0).to(tl.float32)
        if BIAS != 0:
            factor *= 2.0 ** (15 - BIAS)
        total = total * factor
    if bias is not None:
        total += tl.load(bias + feature, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION != "none":
        total = activate(total, ACTIVATION)
    return total


@triton.jit
def skinny_vector(
    x,
    weight,
    scale,
    bias,
    out,
    parts,
    features,
    depth,
    weight_stride,
    scale_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EACH: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    # Features past the last one read the last one's weights and are not stored: no mask on the loads.
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.where(feature < features, feature, features - 1).to(tl.int64)
    column = tl.arange(0, BLOCK_K)
    first = tl.program_id(1) * BLOCK_K
    # Of the EACH products in one 16-byte load only the sum is kept, or the sums would take all registers.
    total = tl.zeros([BLOCK_N, BLOCK_K // EACH], tl.float32)
    for start in tl.range(first, depth, SPLITS * BLOCK_K, num_stages=STAGES):
        place = start + column
        if EVEN:
            value = tl.load(x + place[None, :])
            code = tl.load(
                weight + row[:, None] * weight_stride + place[None, :], eviction_policy="evict_first"
            )
        else:
            inside = (place < depth)[None, :]
            value = tl.load(x + place[None, :], mask=inside, other=0.0)
            code = tl.load(
                weight + row[:, None] * weight_stride + place[None, :],
                mask=inside,
                other=0.0,
                eviction_policy="evict_first",
            )
        if BIAS != 0:
            code = fp8_values(code, BIAS)
        product = code.to(tl.float32) * value.to(tl.float32)
        total += tl.sum(tl.reshape(product, [BLOCK_N, BLOCK_K // EACH, EACH]), axis=2)
    sums = tl.sum(total, axis=1)
    stored = feature < features
    if SPLITS > 1:
        tl.store(parts + tl.program_id(1).to(tl.int64) * features + feature, sums, mask=stored)
    else:
        sums = finished(sums, scale, bias, feature, stored, scale_stride, BIAS, ACTIVATION)
        tl.store(out + feature, sums.to(out.dtype.element_ty), mask=stored)


@triton.jit
def skinny_dot(
    x,
    weight,
    scale,
    bias,
    out,
    parts,
    rows,
    features,
    depth,
    x_stride,
    weight_stride,
    scale_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EARLY: tl.constexpr,
):
    number = tl.arange(0, 16)  # the smallest tile that matrix units take
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.where(feature < features, feature, features - 1).to(tl.int64)
    if EARLY > 0:
        gdc_launch_dependents()
        LINE: tl.constexpr = 128 // (weight.dtype.element_ty.primitive_bitwidth // 8)
        ahead = tl.arange(0, EARLY * BLOCK_K // LINE) * LINE
        ahead = tl.minimum(tl.program_id(1) * BLOCK_K + ahead, depth - 1)
        _fetch(weight + row[:, None] * weight_stride + ahead[None, :])
        gdc_wait()
    column = tl.arange(0, BLOCK_K)
    present = (number < rows)[:, None]
    x_rows = x + number.to(tl.int64)[:, None] * x_stride  # the last of many tokens: rows far apart
    total = tl.zeros([16, BLOCK_N], tl.float32)
    for start in range(tl.program_id(1) * BLOCK_K, depth, SPLITS * BLOCK_K):
        place = start + column
        x_place = x_rows + place[None, :]
        weight_place = weight + row[None, :] * weight_stride + place[:, None]
        if EVEN:
            value = tl.load(x_place, mask=present, other=0.0)
            code = tl.load(weight_place, eviction_policy="evict_first")
        else:
            value = tl.load(x_place, mask=present & (place < depth)[None, :], other=0.0)
            code = tl.load(
                weight_place, mask=(place < depth)[:, None], other=0.0, eviction_policy="evict_first"
            )
        if BIAS != 0:
            code = fp8_values(code, BIAS)
        elif code.dtype.is_fp8():
            # by way of fp32: what goes from fp8 to bf16 straight has a quarter of the rate
            code = code.to(tl.float32) if value.dtype == tl.bfloat16 else code
        total = tl.dot(value, code.to(value.dtype), total)
    inside = feature < features
    stored = present & inside[None, :]
    if SPLITS > 1:
        place = (tl.program_id(1) * rows + number).to(tl.int64)[:, None] * features + feature[None, :]
        tl.store(parts + place, total, mask=stored)
    else:
        total = finished(
            total, scale, bias, feature[None, :], inside[None, :], scale_stride, BIAS, ACTIVATION
        )
        place = number.to(tl.int64)[:, None] * features + feature[None, :]
        tl.store(out + place, total.to(out.dtype.element_ty), mask=stored)


@triton.jit
def skinny_sum(
    parts,
    scale,
    bias,
    out,
    size,
    features,
    scale_stride,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """The sums over [SPLITS, rows, features], ``size`` = rows * features of them, always in one order."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(SPLITS):
        total += tl.load(parts + part * size + place, mask=inside, other=0.0)
    total = finished(total, scale, bias, place % features, inside, scale_stride, BIAS, ACTIVATION)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)
