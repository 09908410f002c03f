"""group_norm with an optional silu, forward and backward, for channels before or behind the spots in memory.

A tensor [N, C, spots] is read in tiles [CHANNELS, SPOTS] of one group. A group that fits in registers is one
program's, read once. A larger one is shared by many programs in two launches: `*_sums` adds up every channel
over parts of the spots ([N, parts, C] in fp32), `*_apply` merges its group's sums, in a fixed order, and
writes. The sums by channel are also what the gradients of weight and bias are made of.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kpt_plugin_triton.kernels.activations import activate, activate_with_slope


@triton.jit
def _place(program, groups, GROUP: tl.constexpr, CHANNELS: tl.constexpr):
    """(batch entry, first channel of the group, the tile's channels counted in their group)."""
    blocks: tl.constexpr = (GROUP + CHANNELS - 1) // CHANNELS
    entry = program // blocks
    batch = entry // groups
    first = (entry % groups) * GROUP
    local = (program % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    return batch, first, local


@triton.jit
def _affine(weight, bias, channel, in_group, CHANNELS: tl.constexpr, WIDE: tl.constexpr):
    """weight and bias of the tile's channels, [CHANNELS, 1]; 1 and 0 where there are none."""
    scale = tl.zeros([CHANNELS], WIDE) + 1.0
    shift = tl.zeros([CHANNELS], WIDE)
    if weight is not None:
        scale = tl.load(weight + channel, mask=in_group, other=0.0).to(WIDE)
    if bias is not None:
        shift = tl.load(bias + channel, mask=in_group, other=0.0).to(WIDE)
    return scale[:, None], shift[:, None]


@triton.jit
def merged(
    one,
    other,
    weight,
    batch,
    parts,
    groups,
    first,
    GROUP: tl.constexpr,
    MERGE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Two sums by channel, [N, parts, C], added up over the group from channel ``first`` on, in one order.

    Each channel's is multiplied by its ``weight``, where there is one.
    """
    total = tl.zeros([MERGE], WIDE)
    rest = tl.zeros([MERGE], WIDE)
    for start in range(0, parts * GROUP, MERGE):
        number = start + tl.arange(0, MERGE)
        among = number < parts * GROUP
        place = (batch * parts + number // GROUP) * (groups * GROUP) + first + number % GROUP
        found = tl.load(one + place, mask=among, other=0.0)
        more = tl.load(other + place, mask=among, other=0.0)
        if weight is not None:
            factor = tl.load(weight + first + number % GROUP, mask=among, other=0.0).to(WIDE)
            found *= factor
            more *= factor
        total += found
        rest += more
    return tl.sum(total, axis=0), tl.sum(rest, axis=0)


@triton.jit
def group_norm_forward(
    x,
    weight,
    bias,
    y,
    mean,
    rstd,
    groups,
    spots,
    x_batch,
    x_channel,
    x_spot,
    eps,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPOTS: tl.constexpr,
    SILU: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A whole group in one tile."""
    program = tl.program_id(0).to(tl.int64)
    batch, first, local = _place(program, groups, GROUP, CHANNELS)
    channel = first + local
    spot = tl.arange(0, SPOTS).to(tl.int64)
    inside = (local < GROUP)[:, None] & (spot < spots)[None, :]
    place = batch * x_batch + channel[:, None] * x_channel + spot[None, :] * x_spot
    value = tl.load(x + place, mask=inside, other=0.0).to(WIDE)
    count = GROUP * tl.cast(spots, WIDE)
    middle = tl.sum(tl.sum(value, axis=1), axis=0) / count
    value = tl.where(inside, value - middle, 0.0)
    inverse = tl.rsqrt(tl.sum(tl.sum(value * value, axis=1), axis=0) / count + eps)
    if mean is not None:
        tl.store(mean + program, middle)
        tl.store(rstd + program, inverse)
    scale, shift = _affine(weight, bias, channel, local < GROUP, CHANNELS, WIDE)
    out = value * inverse * scale + shift
    if SILU:
        out = activate(out, "silu")
    tl.store(y + place, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def group_norm_forward_sums(
    x,
    sums,
    squares,
    groups,
    spots,
    x_batch,
    x_channel,
    x_spot,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPOTS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Sums of x and of its squares, x less the group's first element, so that no digits cancel."""
    batch, first, local = _place(tl.program_id(0).to(tl.int64), groups, GROUP, CHANNELS)
    channel = first + local
    in_group = local < GROUP
    part, parts = tl.program_id(1), tl.num_programs(1)
    origin = tl.load(x + batch * x_batch + first * x_channel).to(WIDE)
    row = x + batch * x_batch + channel[:, None] * x_channel
    total = tl.zeros([CHANNELS, SPOTS], WIDE)
    square = tl.zeros([CHANNELS, SPOTS], WIDE)
    for tile in range(part, tl.cdiv(spots, SPOTS), parts):
        spot = tile * SPOTS + tl.arange(0, SPOTS).to(tl.int64)
        inside = in_group[:, None] & (spot < spots)[None, :]
        value = tl.load(row + spot[None, :] * x_spot, mask=inside, other=0.0).to(WIDE)
        value = tl.where(inside, value - origin, 0.0)
        total += value
        square += value * value
    place = (batch * parts + part) * (groups * GROUP) + channel
    tl.store(sums + place, tl.sum(total, axis=1), mask=in_group)
    tl.store(squares + place, tl.sum(square, axis=1), mask=in_group)


@triton.jit
def group_norm_forward_apply(
    x,
    sums,
    squares,
    weight,
    bias,
    y,
    mean,
    rstd,
    groups,
    spots,
    x_batch,
    x_channel,
    x_spot,
    eps,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPOTS: tl.constexpr,
    MERGE: tl.constexpr,
    SILU: tl.constexpr,
    WIDE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    batch, first, local = _place(program, groups, GROUP, CHANNELS)
    channel = first + local
    in_group = local < GROUP
    part, parts = tl.program_id(1), tl.num_programs(1)
    total, square = merged(sums, squares, None, batch, parts, groups, first, GROUP, MERGE, WIDE)
    count = GROUP * tl.cast(spots, WIDE)
    moved = total / count
    variance = square / count - moved * moved
    middle = tl.load(x + batch * x_batch + first * x_channel).to(WIDE) + moved
    inverse = tl.rsqrt(tl.maximum(variance, 0.0) + eps)
    if mean is not None:
        blocks: tl.constexpr = (GROUP + CHANNELS - 1) // CHANNELS
        once = (program % blocks == 0) & (part == 0)
        tl.store(mean + program // blocks, middle, mask=once)
        tl.store(rstd + program // blocks, inverse, mask=once)
    scale, shift = _affine(weight, bias, channel, in_group, CHANNELS, WIDE)
    row = batch * x_batch + channel[:, None] * x_channel
    for tile in range(part, tl.cdiv(spots, SPOTS), parts):
        spot = tile * SPOTS + tl.arange(0, SPOTS).to(tl.int64)
        inside = in_group[:, None] & (spot < spots)[None, :]
        value = tl.load(x + row + spot[None, :] * x_spot, mask=inside, other=0.0).to(WIDE)
        out = (value - middle) * inverse * scale + shift
        if SILU:
            out = activate(out, "silu")
        tl.store(y + row + spot[None, :] * x_spot, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def gradient_of(value, grad, middle, inverse, scale, shift, SILU: tl.constexpr):
    """(x normalised, the gradient in front of the activation)."""
    unit = (value - middle) * inverse
    if SILU:
        _, slope = activate_with_slope(unit * scale + shift, "silu")
        grad = grad * slope
    return unit, grad


@triton.jit
def group_norm_backward(
    x,
    dy,
    weight,
    bias,
    mean,
    rstd,
    dx,
    weight_sums,
    bias_sums,
    groups,
    spots,
    x_batch,
    x_channel,
    x_spot,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPOTS: tl.constexpr,
    SILU: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A whole group in one tile; the sums are [N, C]."""
    program = tl.program_id(0).to(tl.int64)
    batch, first, local = _place(program, groups, GROUP, CHANNELS)
    channel = first + local
    in_group = local < GROUP
    spot = tl.arange(0, SPOTS).to(tl.int64)
    inside = in_group[:, None] & (spot < spots)[None, :]
    place = batch * x_batch + channel[:, None] * x_channel + spot[None, :] * x_spot
    value = tl.load(x + place, mask=inside, other=0.0).to(WIDE)
    grad = tl.load(dy + place, mask=inside, other=0.0).to(WIDE)
    inverse = tl.load(rstd + program)
    scale, shift = _affine(weight, bias, channel, in_group, CHANNELS, WIDE)
    unit, grad = gradient_of(value, grad, tl.load(mean + program), inverse, scale, shift, SILU)
    along = tl.sum(grad * unit, axis=1)
    plain = tl.sum(grad, axis=1)
    if weight_sums is not None:
        tl.store(weight_sums + batch * (groups * GROUP) + channel, along, mask=in_group)
        tl.store(bias_sums + batch * (groups * GROUP) + channel, plain, mask=in_group)
    count = GROUP * tl.cast(spots, WIDE)
    shared = tl.sum(tl.sum(along[:, None] * scale, axis=1), axis=0) / count
    common = tl.sum(tl.sum(plain[:, None] * scale, axis=1), axis=0) / count
    out = (grad * scale - common - unit * shared) * inverse
    tl.store(dx + place, out.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def group_norm_backward_sums(
    x,
    dy,
    weight,
    bias,
    mean,
    rstd,
    weight_sums,
    bias_sums,
    groups,
    spots,
    x_batch,
    x_channel,
    x_spot,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPOTS: tl.constexpr,
    SILU: tl.constexpr,
    WIDE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    batch, first, local = _place(program, groups, GROUP, CHANNELS)
    channel = first + local
    in_group = local < GROUP
    part, parts = tl.program_id(1), tl.num_programs(1)
    group = batch * groups + first // GROUP
    middle = tl.load(mean + group)
    inverse = tl.load(rstd + group)
    scale, shift = _affine(weight, bias, channel, in_group, CHANNELS, WIDE)
    row = batch * x_batch + channel[:, None] * x_channel
    along = tl.zeros([CHANNELS, SPOTS], WIDE)
    plain = tl.zeros([CHANNELS, SPOTS], WIDE)
    for tile in range(part, tl.cdiv(spots, SPOTS), parts):
        spot = tile * SPOTS + tl.arange(0, SPOTS).to(tl.int64)
        inside = in_group[:, None] & (spot < spots)[None, :]
        value = tl.load(x + row + spot[None, :] * x_spot, mask=inside, other=0.0).to(WIDE)
        grad = tl.load(dy + row + spot[None, :] * x_spot, mask=inside, other=0.0).to(WIDE)
        unit, grad = gradient_of(value, grad, middle, inverse, scale, shift, SILU)
        along += grad * unit  # where a tile reaches out of the tensor, its gradient is 0
        plain += grad
    place = (batch * parts + part) * (groups * GROUP) + channel
    tl.store(weight_sums + place, tl.sum(along, axis=1), mask=in_group)
    tl.store(bias_sums + place, tl.sum(plain, axis=1), mask=in_group)


@triton.jit
def group_norm_backward_apply(
    x,
    dy,
    weight,
    bias,
    mean,
    rstd,
    weight_sums,
    bias_sums,
    dx,
    groups,
    spots,
    x_batch,
    x_channel,
    x_spot,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPOTS: tl.constexpr,
    MERGE: tl.constexpr,
    SILU: tl.constexpr,
    WIDE: tl.constexpr,
):
    batch, first, local = _place(tl.program_id(0).to(tl.int64), groups, GROUP, CHANNELS)
    channel = first + local
    in_group = local < GROUP
    part, parts = tl.program_id(1), tl.num_programs(1)
    along, plain = merged(weight_sums, bias_sums, weight, batch, parts, groups, first, GROUP, MERGE, WIDE)
    count = GROUP * tl.cast(spots, WIDE)
    shared = along / count
    common = plain / count
    group = batch * groups + first // GROUP
    middle = tl.load(mean + group)
    inverse = tl.load(rstd + group)
    scale, shift = _affine(weight, bias, channel, in_group, CHANNELS, WIDE)
    row = batch * x_batch + channel[:, None] * x_channel
    for tile in range(part, tl.cdiv(spots, SPOTS), parts):
        spot = tile * SPOTS + tl.arange(0, SPOTS).to(tl.int64)
        inside = in_group[:, None] & (spot < spots)[None, :]
        value = tl.load(x + row + spot[None, :] * x_spot, mask=inside, other=0.0).to(WIDE)
        grad = tl.load(dy + row + spot[None, :] * x_spot, mask=inside, other=0.0).to(WIDE)
        unit, grad = gradient_of(value, grad, middle, inverse, scale, shift, SILU)
        out = (grad * scale - common - unit * shared) * inverse
        tl.store(dx + row + spot[None, :] * x_spot, out.to(dx.dtype.element_ty), mask=inside)
