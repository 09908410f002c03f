"""Softmax over long rows of 16-bit numbers, forward and backward, for multiprocessors of sm_90.

As in `hopper_cross_entropy`, a program walks over rows and reads each from memory once: whole chunks of
columns lie in a ring of shared memory, the row's end in registers. What is written of one row makes room for
the program's next one, whose sum is taken in the same steps.

Exponentials are summed over the largest of a few columns, which are read ahead; a row whose sum grows too
large for that is summed again over its maximum.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from kpt_plugin_triton.kernels.hopper_rows import (
    LOG2E,
    TRUSTED,
    largest,
    next_of,
    refill,
    wide_values,
)

#: Beyond it neighbouring numbers of 16 bits are thousands apart.
LARGE = gl.constexpr(1048576.0)


@gluon.jit
def _largest_of_few(x, row, rows, columns, stride):
    """The largest of 32 columns, from the first on, of a row if there is such a row; it may be -inf."""
    few = gl.arange(0, 32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    place = x + row.to(gl.int64) * stride + few * (columns // 32)
    return gl.max(gl.load(place, mask=(row < rows) & (few >= 0), other=0.0).to(gl.float32), axis=0)


@gluon.jit
def _scale_for(shift):
    """log2(e), but 1 where a product of that with ``shift`` is rounded by more than exponents may be off.

    Numbers of 16 bits as large as that are thousands apart, and their exponentials 0 or 1 to any base: a row
    of nothing but a mask's most negative number comes out even.
    """
    return gl.where((shift < LARGE) & (shift > -LARGE), LOG2E, 1.0)


@gluon.jit
def _exponentials(raw, shift, scale):
    """exp(raw - shift) in fp32 for a ``scale`` of log2(e).

    What rounding does to the shift's product is the same for the whole row, and divides out of softmax.
    """
    return gl.exp2(wide_values(raw) * scale - shift * scale)


@gluon.jit
def _sums_over(
    ring,
    first,
    held,
    shift,
    scale,
    BLOCK: gl.constexpr,
    RING: gl.constexpr,
    SLOTS: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Each thread's sum of exponentials of a row that lies in the ring and in registers, over ``shift``."""
    total = gl.zeros([BLOCK], gl.float32, LAYOUT)
    for number in gl.static_range(len(held)):
        total += _exponentials(held[number], shift, scale)
    slot = first
    for _ in range(RING):
        total += _exponentials(ring.index(slot).load(LAYOUT), shift, scale)
        slot = next_of(slot, SLOTS)
    return total


@gluon.jit(do_not_specialize=["rows"])
def softmax_staged(
    x,
    y,
    rows,
    columns,
    stride,
    BLOCK: gl.constexpr,
    CHUNKS: gl.constexpr,
    HELD: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """Rows of CHUNKS chunks of BLOCK columns, the last one perhaps incomplete, HELD of them in registers."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([8], [32], [gl.num_warps()], [0])
    RING: gl.constexpr = CHUNKS - HELD
    ring = gl.allocate_shared_memory(
        x.dtype.element_ty, [SLOTS, BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    place = gl.arange(0, BLOCK, LAYOUT)
    step = gl.num_programs(0)
    row = gl.program_id(0)
    # the chunk that the ring takes next
    ahead_row = row
    ahead = 0
    for number in range(SLOTS):
        refill(ring, number, x, ahead_row, ahead, rows, stride, BLOCK, LAYOUT)
        ahead_row = gl.where(ahead + 1 == RING, ahead_row + step, ahead_row)
        ahead = next_of(ahead, RING)
    few = _largest_of_few(x, row, rows, columns, stride)
    shift = gl.where(few == float("-inf"), 0.0, few)
    scale = _scale_for(shift)
    held = ()
    for number in gl.static_range(HELD):
        column = (RING + number) * BLOCK + place
        first = gl.load(x + row.to(gl.int64) * stride + column, mask=column < columns, other=float("-inf"))
        held = held + (first,)
    async_copy.wait_group(SLOTS - RING)
    slot = 0
    total = _sums_over(ring, slot, held, shift, scale, BLOCK, RING, SLOTS, LAYOUT)
    while row < rows:
        following = row + step
        next_few = _largest_of_few(x, following, rows, columns, stride)
        mass = gl.sum(total, axis=0)
        if not (mass < TRUSTED) or few == float("-inf"):
            shift = largest(ring, slot, held, BLOCK, RING, SLOTS, LAYOUT)
            scale = _scale_for(shift)
            total = _sums_over(ring, slot, held, shift, scale, BLOCK, RING, SLOTS, LAYOUT)
            mass = gl.sum(total, axis=0)
        inverse = 1.0 / mass
        few = next_few
        next_shift = gl.where(few == float("-inf"), 0.0, few)
        next_scale = _scale_for(next_shift)
        sink = y + row.to(gl.int64) * columns
        source = x + following.to(gl.int64) * stride
        fresh = ()
        for number in gl.static_range(HELD):
            column = (RING + number) * BLOCK + place
            inside = column < columns
            out = _exponentials(held[number], shift, scale) * inverse
            gl.store(sink + column, out.to(y.dtype.element_ty), mask=inside, cache_modifier=".cs")
            fresh = fresh + (gl.load(source + column, mask=inside & (following < rows), other=float("-inf")),)
        total = gl.zeros([BLOCK], gl.float32, LAYOUT)
        # where the next row begins
        coming = slot + RING
        if coming >= SLOTS:
            coming -= SLOTS
        for number in range(RING):
            async_copy.wait_group(SLOTS - RING - 1)
            raw = ring.index(slot).load(LAYOUT)
            new = ring.index(coming).load(LAYOUT)
            refill(ring, slot, x, ahead_row, ahead, rows, stride, BLOCK, LAYOUT)
            out = _exponentials(raw, shift, scale) * inverse
            gl.store(sink + number * BLOCK + place, out.to(y.dtype.element_ty), cache_modifier=".cs")
            total += _exponentials(new, next_shift, next_scale)
            slot = next_of(slot, SLOTS)
            coming = next_of(coming, SLOTS)
            ahead_row = gl.where(ahead + 1 == RING, ahead_row + step, ahead_row)
            ahead = next_of(ahead, RING)
        for number in gl.static_range(HELD):
            total += _exponentials(fresh[number], next_shift, next_scale)
        shift = next_shift
        scale = next_scale
        held = fresh
        row = following
    async_copy.wait_group(0)


@gluon.jit
def _refill_pair(
    values,
    grads,
    slot,
    y,
    dy,
    row,
    chunk,
    rows,
    y_stride,
    dy_stride,
    BLOCK: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Start to copy a chunk of two rows to its place in two rings, as one group, if there is such a row."""
    column = chunk * BLOCK + gl.arange(0, BLOCK, LAYOUT)
    present = (row < rows) & (column >= 0)
    at = row.to(gl.int64)
    async_copy.async_copy_global_to_shared(values.index(slot), y + at * y_stride + column, mask=present)
    async_copy.async_copy_global_to_shared(grads.index(slot), dy + at * dy_stride + column, mask=present)
    async_copy.commit_group()


@gluon.jit
def _pair(y, dy, row, column, columns, rows, y_stride, dy_stride):
    """A chunk of two rows, zero where there is none."""
    at = row.to(gl.int64)
    inside = (column < columns) & (row < rows)
    value = gl.load(y + at * y_stride + column, mask=inside, other=0.0)
    return value, gl.load(dy + at * dy_stride + column, mask=inside, other=0.0)


@gluon.jit(do_not_specialize=["rows"])
def softmax_gradient_staged(
    y,
    dy,
    dx,
    rows,
    columns,
    y_stride,
    dy_stride,
    BLOCK: gl.constexpr,
    CHUNKS: gl.constexpr,
    HELD: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """``y * (dy - sum(y * dy))``; constants as of `softmax_staged`, for a ring of y and one of dy."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([8], [32], [gl.num_warps()], [0])
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    RING: gl.constexpr = CHUNKS - HELD
    values = gl.allocate_shared_memory(y.dtype.element_ty, [SLOTS, BLOCK], SHARED)
    grads = gl.allocate_shared_memory(dy.dtype.element_ty, [SLOTS, BLOCK], SHARED)
    place = gl.arange(0, BLOCK, LAYOUT)
    step = gl.num_programs(0)
    row = gl.program_id(0)
    ahead_row = row
    ahead = 0
    for number in range(SLOTS):
        _refill_pair(values, grads, number, y, dy, ahead_row, ahead, rows, y_stride, dy_stride, BLOCK, LAYOUT)
        ahead_row = gl.where(ahead + 1 == RING, ahead_row + step, ahead_row)
        ahead = next_of(ahead, RING)
    held_values = ()
    held_grads = ()
    for number in gl.static_range(HELD):
        column = (RING + number) * BLOCK + place
        value, grad = _pair(y, dy, row, column, columns, rows, y_stride, dy_stride)
        held_values = held_values + (value,)
        held_grads = held_grads + (grad,)
    total = gl.zeros([BLOCK], gl.float32, LAYOUT)
    async_copy.wait_group(SLOTS - RING)
    for number in range(RING):
        value = values.index(number).load(LAYOUT)
        total += wide_values(value) * wide_values(grads.index(number).load(LAYOUT))
    for number in gl.static_range(HELD):
        total += wide_values(held_values[number]) * wide_values(held_grads[number])
    slot = 0
    while row < rows:
        following = row + step
        middle = gl.sum(total, axis=0)
        sink = dx + row.to(gl.int64) * columns
        fresh_values = ()
        fresh_grads = ()
        for number in gl.static_range(HELD):
            column = (RING + number) * BLOCK + place
            out = wide_values(held_values[number]) * (wide_values(held_grads[number]) - middle)
            gl.store(sink + column, out.to(dx.dtype.element_ty), mask=column < columns, cache_modifier=".cs")
            value, grad = _pair(y, dy, following, column, columns, rows, y_stride, dy_stride)
            fresh_values = fresh_values + (value,)
            fresh_grads = fresh_grads + (grad,)
        total = gl.zeros([BLOCK], gl.float32, LAYOUT)
        coming = slot + RING
        if coming >= SLOTS:
            coming -= SLOTS
        for number in range(RING):
            async_copy.wait_group(SLOTS - RING - 1)
            value = values.index(slot).load(LAYOUT)
            grad = grads.index(slot).load(LAYOUT)
            new_value = values.index(coming).load(LAYOUT)
            new_grad = grads.index(coming).load(LAYOUT)
            _refill_pair(
                values, grads, slot, y, dy, ahead_row, ahead, rows, y_stride, dy_stride, BLOCK, LAYOUT
            )
            out = wide_values(value) * (wide_values(grad) - middle)
            gl.store(sink + number * BLOCK + place, out.to(dx.dtype.element_ty), cache_modifier=".cs")
            total += wide_values(new_value) * wide_values(new_grad)
            slot = next_of(slot, SLOTS)
            coming = next_of(coming, SLOTS)
            ahead_row = gl.where(ahead + 1 == RING, ahead_row + step, ahead_row)
            ahead = next_of(ahead, RING)
        for number in gl.static_range(HELD):
            total += wide_values(fresh_values[number]) * wide_values(fresh_grads[number])
        held_values = fresh_values
        held_grads = fresh_grads
        row = following
    async_copy.wait_group(0)
