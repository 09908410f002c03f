"""Cross entropy with its gradient over long rows of 16-bit logits, for multiprocessors of sm_90.

A program walks over rows, and keeps its row on the multiprocessor: whole chunks of columns in a ring of
shared memory, and the row's end in registers. A chunk whose gradient is written makes room for a chunk of the
program's next row, which is on its way while the following ones are worked on. The next row's exponentials
are summed in the same steps, so that reads, writes and arithmetic go on side by side; the ring has room for
more than a row's chunks, so that memory is busy while a row's sum is taken together.

Sums are taken over the label's logit, which is known beforehand; a row whose sum grows too large for that is
summed again over its maximum.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from kpt_plugin_triton.kernels import loss_terms
from kpt_plugin_triton.kernels.hopper_rows import (
    LOG2E,
    TRUSTED,
    barrier,
    largest,
    next_of,
    refill,
    wide_values,
)

_class_factor = gluon.jit(loss_terms.class_factor.fn)
_row_loss = gluon.jit(loss_terms.row_loss.fn)
_row_multiplier = gluon.jit(loss_terms.row_multiplier.fn)


@gluon.jit
def _exponentials(raw, shift):
    """exp(raw - shift) in fp32, by one fused multiply-add and one power of two."""
    return gl.exp2(wide_values(raw) * LOG2E - shift * LOG2E)


@gluon.jit
def _sum_again(
    ring,
    first,
    held,
    shift,
    BLOCK: gl.constexpr,
    RING: gl.constexpr,
    SLOTS: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """The sum of exponentials of such a row over ``shift``."""
    total = gl.zeros([BLOCK], gl.float32, LAYOUT)
    for number in gl.static_range(len(held)):
        total += _exponentials(held[number], shift)
    slot = first
    for _ in range(RING):
        total += _exponentials(ring.index(slot).load(LAYOUT), shift)
        slot = next_of(slot, SLOTS)
    return gl.sum(total, axis=0)


@gluon.jit
def _gradient(raw, counts, lse, multiplier, BLOCK: gl.constexpr, LAYOUT: gl.constexpr):
    """The gradient of a chunk of columns, but for the label's part."""
    out = gl.zeros([BLOCK], gl.float32, LAYOUT)
    if counts:
        out = _exponentials(raw, lse) * multiplier
    return out


@gluon.jit
def _label_of(target, logits, row, rows, columns, stride, ignore_index):
    """(label, its logit or 0 where there is no such class) of a row, if there is such a row."""
    label = gl.load(target + row, mask=row < rows, other=0).to(gl.int64)
    known = (row < rows) & (label >= 0) & (label < columns)
    chosen = gl.load(logits + row.to(gl.int64) * stride + gl.where(known, label, 0), mask=known, other=0.0)
    return label, chosen.to(gl.float32)


@gluon.jit(do_not_specialize=["rows", "parts", "ignore_index"])
def cross_entropy_staged(
    logits,
    target,
    weight,
    denominators,
    lses,
    losses,
    partials,
    gradient,
    rows,
    columns,
    stride,
    parts,
    ignore_index,
    z_loss,
    BLOCK: gl.constexpr,
    CHUNKS: gl.constexpr,
    HELD: gl.constexpr,
    SLOTS: gl.constexpr,
    LAG: gl.constexpr,
    PARTS: gl.constexpr,
    Z: gl.constexpr,
):
    """Losses and gradients of rows of CHUNKS chunks of BLOCK columns, the last one perhaps incomplete.

    The last HELD chunks are kept in registers, the others in a ring of SLOTS chunks, which is larger than
    that. ``gradient`` [rows, columns] may be ``logits`` if that is contiguous.
    """
    WARPS: gl.constexpr = gl.num_warps()
    LAYOUT: gl.constexpr = gl.BlockedLayout([8], [32], [WARPS], [0])
    RING: gl.constexpr = CHUNKS - HELD
    WAITING: gl.constexpr = SLOTS - RING - 1 + LAG
    ring = gl.allocate_shared_memory(
        logits.dtype.element_ty, [SLOTS, BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    place = gl.arange(0, BLOCK, LAYOUT)
    scale = 1.0
    if denominators is not None:
        part = gl.arange(0, PARTS, gl.BlockedLayout([1], [32], [WARPS], [0]))
        scale = 1.0 / gl.sum(gl.load(denominators + part, mask=part < parts, other=0.0), axis=0)
    step = gl.num_programs(0)
    row = gl.program_id(0)
    kept = 0.0
    # the chunk that the ring takes next
    ahead_row = row
    ahead = 0
    for number in range(SLOTS):
        refill(ring, number, logits, ahead_row, ahead, rows, stride, BLOCK, LAYOUT)
        ahead_row = gl.where(ahead + 1 == RING, ahead_row + step, ahead_row)
        ahead = next_of(ahead, RING)
    label, chosen = _label_of(target, logits, row, rows, columns, stride, ignore_index)
    held = ()
    for number in gl.static_range(HELD):
        column = (RING + number) * BLOCK + place
        held = held + (
            gl.load(logits + row.to(gl.int64) * stride + column, mask=column < columns, other=float("-inf")),
        )
    shift = gl.where(chosen == float("-inf"), 0.0, chosen)
    total = gl.zeros([BLOCK], gl.float32, LAYOUT)
    HALF: gl.constexpr = RING // 2
    async_copy.wait_group(SLOTS - HALF)
    for number in range(HALF):
        total += _exponentials(ring.index(number).load(LAYOUT), shift)
    async_copy.wait_group(SLOTS - RING)
    for number in range(HALF, RING):
        total += _exponentials(ring.index(number).load(LAYOUT), shift)
    for number in gl.static_range(HELD):
        total += _exponentials(held[number], shift)
    slot = 0
    while row < rows:
        following = row + step
        next_label, next_chosen = _label_of(target, logits, following, rows, columns, stride, ignore_index)
        counts = label != ignore_index
        bad = (label < 0) | (label >= columns)
        mass = gl.sum(total, axis=0)
        if counts:
            if not (mass < TRUSTED) or chosen == float("-inf"):
                shift = largest(ring, slot, held, BLOCK, RING, SLOTS, LAYOUT)
                mass = _sum_again(ring, slot, held, shift, BLOCK, RING, SLOTS, LAYOUT)
        lse = shift + gl.log(mass)
        factor = _class_factor(label, bad, weight, gl.float32)
        loss = _row_loss(chosen, lse, lse, factor, 0.0, 0.0, 0.0, z_loss, False, Z)
        loss = gl.where(counts, loss, 0.0)
        kept += loss
        if losses is not None:
            gl.store(losses + row, loss.to(losses.dtype.element_ty))
        if lses is not None:
            gl.store(lses + row, gl.where(counts, lse, 0.0))
        multiplier = scale * _row_multiplier(lse, factor, 0.0, 0.0, 0.0, z_loss, False, Z)
        own = gl.exp2((chosen - lse) * LOG2E) * multiplier - scale * factor
        shift = gl.where(next_chosen == float("-inf"), 0.0, next_chosen)
        sink = gradient + row.to(gl.int64) * columns
        source = logits + following.to(gl.int64) * stride
        fresh = ()
        for number in gl.static_range(HELD):
            column = (RING + number) * BLOCK + place
            inside = column < columns
            out = _gradient(held[number], counts, lse, multiplier, BLOCK, LAYOUT)
            gl.store(sink + column, out.to(gradient.dtype.element_ty), mask=inside, cache_modifier=".cs")
            fresh = fresh + (gl.load(source + column, mask=inside & (following < rows), other=float("-inf")),)
        total = gl.zeros([BLOCK], gl.float32, LAYOUT)
        # where the next row begins
        coming = slot + RING
        if coming >= SLOTS:
            coming -= SLOTS
        for number in range(LAG):
            async_copy.wait_group(WAITING)
            raw = ring.index(slot).load(LAYOUT)
            refill(ring, slot, logits, ahead_row, ahead, rows, stride, BLOCK, LAYOUT)
            out = _gradient(raw, counts, lse, multiplier, BLOCK, LAYOUT)
            gl.store(sink + number * BLOCK + place, out.to(gradient.dtype.element_ty), cache_modifier=".cs")
            slot = next_of(slot, SLOTS)
            ahead_row = gl.where(ahead + 1 == RING, ahead_row + step, ahead_row)
            ahead = next_of(ahead, RING)
        for number in range(LAG, RING):
            async_copy.wait_group(WAITING)
            raw = ring.index(slot).load(LAYOUT)
            new = ring.index(coming).load(LAYOUT)
            refill(ring, slot, logits, ahead_row, ahead, rows, stride, BLOCK, LAYOUT)
            out = _gradient(raw, counts, lse, multiplier, BLOCK, LAYOUT)
            gl.store(sink + number * BLOCK + place, out.to(gradient.dtype.element_ty), cache_modifier=".cs")
            total += _exponentials(new, shift)
            slot = next_of(slot, SLOTS)
            coming = next_of(coming, SLOTS)
            ahead_row = gl.where(ahead + 1 == RING, ahead_row + step, ahead_row)
            ahead = next_of(ahead, RING)
        for number in gl.static_range(HELD):
            total += _exponentials(fresh[number], shift)
        for number in gl.static_range(LAG):
            async_copy.wait_group(WAITING - 1 - number)
            total += _exponentials(ring.index(coming).load(LAYOUT), shift)
            coming = next_of(coming, SLOTS)
        # after all threads' stores: the label's element is written again
        barrier()
        if counts & (bad == 0):
            gl.store(sink + label, own.to(gradient.dtype.element_ty))
        held = fresh
        label = next_label
        chosen = next_chosen
        row = following
    async_copy.wait_group(0)
    if partials is not None:
        gl.store(partials + gl.program_id(0), kept)
