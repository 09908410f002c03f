"""group_norm for channels behind the spots in memory, where groups are too large for one program's registers.

A group's channels are a few bytes of each spot: read alone, most of what memory delivers is thrown away. A
program takes a stripe instead, [SPOTS, CHANNELS], over as many channels of several groups as fill its reads.
Three launches each way: `*_sums` adds up every channel over parts of the spots ([N, parts, C] in fp32),
`*_merge` makes what a group has in common of them, in a fixed order, and `*_apply` writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kpt_plugin_triton.kernels.activations import activate
from kpt_plugin_triton.kernels.group_norm import gradient_of, merged


@triton.jit
def _stripe(program, channels, CHANNELS: tl.constexpr):
    """(batch entry, the channels of a program's stripe)."""
    blocks = tl.cdiv(channels, CHANNELS)
    return program // blocks, (program % blocks) * CHANNELS + tl.arange(0, CHANNELS)


@triton.jit
def _by_channel(values, default, channel, known, WIDE: tl.constexpr):
    """``values`` of the stripe's channels, [1, CHANNELS]; ``default`` where there are none."""
    found = tl.full(channel.shape, default, WIDE)
    if values is not None:
        found = tl.load(values + channel, mask=known, other=0.0).to(WIDE)
    return found[None, :]


@triton.jit
def _facts(mean, rstd, weight, bias, group, channel, known, WIDE: tl.constexpr):
    """Mean and reciprocal deviation of the groups of a stripe's channels, weight and bias: [1, CHANNELS]."""
    middle = tl.load(mean + group, mask=known, other=0.0)[None, :]
    inverse = tl.load(rstd + group, mask=known, other=0.0)[None, :]
    scale = _by_channel(weight, 1.0, channel, known, WIDE)
    shift = _by_channel(bias, 0.0, channel, known, WIDE)
    return middle, inverse, scale, shift


@triton.jit
def stripe_forward_sums(
    x,
    sums,
    squares,
    channels,
    spots,
    x_batch,
    x_spot,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPOTS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Sums of x and of its squares, x less its group's first element, so that no digits cancel."""
    batch, channel = _stripe(tl.program_id(0).to(tl.int64), channels, CHANNELS)
    known = channel < channels
    part, parts = tl.program_id(1), tl.num_programs(1)
    start = x + batch * x_batch
    origin = tl.load(start + channel // GROUP * GROUP, mask=known, other=0.0).to(WIDE)[None, :]
    total = tl.zeros([SPOTS, CHANNELS], WIDE)
    square = tl.zeros([SPOTS, CHANNELS], WIDE)
    for tile in range(part, tl.cdiv(spots, SPOTS), parts):
        spot = tile * SPOTS + tl.arange(0, SPOTS).to(tl.int64)
        inside = (spot < spots)[:, None] & known[None, :]
        value = tl.load(start + spot[:, None] * x_spot + channel[None, :], mask=inside, other=0.0).to(WIDE)
        value = tl.where(inside, value - origin, 0.0)
        total += value
        square += value * value
    place = (batch * parts + part) * channels + channel
    tl.store(sums + place, tl.sum(total, axis=0), mask=known)
    tl.store(squares + place, tl.sum(square, axis=0), mask=known)


@triton.jit
def stripe_forward_merge(
    x,
    sums,
    squares,
    mean,
    rstd,
    parts,
    groups,
    spots,
    x_batch,
    eps,
    GROUP: tl.constexpr,
    MERGE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Mean and reciprocal deviation of one group."""
    program = tl.program_id(0).to(tl.int64)
    batch, first = program // groups, (program % groups) * GROUP
    total, square = merged(sums, squares, None, batch, parts, groups, first, GROUP, MERGE, WIDE)
    count = GROUP * tl.cast(spots, WIDE)
    moved = total / count
    variance = square / count - moved * moved
    tl.store(mean + program, tl.load(x + batch * x_batch + first).to(WIDE) + moved)
    tl.store(rstd + program, tl.rsqrt(tl.maximum(variance, 0.0) + eps))


@triton.jit
def stripe_forward_apply(
    x,
    mean,
    rstd,
    weight,
    bias,
    y,
    channels,
    spots,
    x_batch,
    x_spot,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPOTS: tl.constexpr,
    SILU: tl.constexpr,
    WIDE: tl.constexpr,
):
    batch, channel = _stripe(tl.program_id(0).to(tl.int64), channels, CHANNELS)
    known = channel < channels
    group = batch * (channels // GROUP) + channel // GROUP
    middle, inverse, scale, shift = _facts(mean, rstd, weight, bias, group, channel, known, WIDE)
    for tile in range(tl.program_id(1), tl.cdiv(spots, SPOTS), tl.num_programs(1)):
        spot = tile * SPOTS + tl.arange(0, SPOTS).to(tl.int64)
        inside = (spot < spots)[:, None] & known[None, :]
        place = batch * x_batch + spot[:, None] * x_spot + channel[None, :]
        value = tl.load(x + place, mask=inside, other=0.0).to(WIDE)
        out = (value - middle) * inverse * scale + shift
        if SILU:
            out = activate(out, "silu")
        tl.store(y + place, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def stripe_backward_sums(
    x,
    dy,
    weight,
    bias,
    mean,
    rstd,
    weight_sums,
    bias_sums,
    channels,
    spots,
    x_batch,
    x_spot,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPOTS: tl.constexpr,
    SILU: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The gradients of weight and bias, for one part of one batch entry."""
    batch, channel = _stripe(tl.program_id(0).to(tl.int64), channels, CHANNELS)
    known = channel < channels
    part, parts = tl.program_id(1), tl.num_programs(1)
    group = batch * (channels // GROUP) + channel // GROUP
    middle, inverse, scale, shift = _facts(mean, rstd, weight, bias, group, channel, known, WIDE)
    along = tl.zeros([SPOTS, CHANNELS], WIDE)
    plain = tl.zeros([SPOTS, CHANNELS], WIDE)
    for tile in range(part, tl.cdiv(spots, SPOTS), parts):
        spot = tile * SPOTS + tl.arange(0, SPOTS).to(tl.int64)
        inside = (spot < spots)[:, None] & known[None, :]
        place = batch * x_batch + spot[:, None] * x_spot + channel[None, :]
        value = tl.load(x + place, mask=inside, other=0.0).to(WIDE)
        grad = tl.load(dy + place, mask=inside, other=0.0).to(WIDE)
        unit, grad = gradient_of(value, grad, middle, inverse, scale, shift, SILU)
        along += grad * unit  # where a tile reaches out of the tensor, its gradient is 0
        plain += grad
    place = (batch * parts + part) * channels + channel
    tl.store(weight_sums + place, tl.sum(along, axis=0), mask=known)
    tl.store(bias_sums + place, tl.sum(plain, axis=0), mask=known)


@triton.jit
def stripe_backward_merge(
    weight_sums,
    bias_sums,
    weight,
    shared,
    common,
    parts,
    groups,
    spots,
    GROUP: tl.constexpr,
    MERGE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """What all gradients of one group lose: ``shared`` times x normalised, and ``common``."""
    program = tl.program_id(0).to(tl.int64)
    batch, first = program // groups, (program % groups) * GROUP
    along, plain = merged(weight_sums, bias_sums, weight, batch, parts, groups, first, GROUP, MERGE, WIDE)
    count = GROUP * tl.cast(spots, WIDE)
    tl.store(shared + program, along / count)
    tl.store(common + program, plain / count)


@triton.jit
def stripe_backward_apply(
    x,
    dy,
    weight,
    bias,
    mean,
    rstd,
    shared,
    common,
    dx,
    channels,
    spots,
    x_batch,
    x_spot,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPOTS: tl.constexpr,
    SILU: tl.constexpr,
    WIDE: tl.constexpr,
):
    batch, channel = _stripe(tl.program_id(0).to(tl.int64), channels, CHANNELS)
    known = channel < channels
    group = batch * (channels // GROUP) + channel // GROUP
    middle, inverse, scale, shift = _facts(mean, rstd, weight, bias, group, channel, known, WIDE)
    along = tl.load(shared + group, mask=known, other=0.0)[None, :]
    plain = tl.load(common + group, mask=known, other=0.0)[None, :]
    for tile in range(tl.program_id(1), tl.cdiv(spots, SPOTS), tl.num_programs(1)):
        spot = tile * SPOTS + tl.arange(0, SPOTS).to(tl.int64)
        inside = (spot < spots)[:, None] & known[None, :]
        place = batch * x_batch + spot[:, None] * x_spot + channel[None, :]
        value = tl.load(x + place, mask=inside, other=0.0).to(WIDE)
        grad = tl.load(dy + place, mask=inside, other=0.0).to(WIDE)
        unit, grad = gradient_of(value, grad, middle, inverse, scale, shift, SILU)
        out = (grad * scale - plain - unit * along) * inverse
        tl.store(dx + place, out.to(dx.dtype.element_ty), mask=inside)
