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

_class_factor = gluon.jit(loss_terms.class_factor.fn)
_row_loss = gluon.jit(loss_terms.row_loss.fn)
_row_multiplier = gluon.jit(loss_terms.row_multiplier.fn)

#: Triton 3.6 calls it by another name.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

LOG2E = gl.constexpr(1.4426950408889634)
#: Beyond it a sum may weigh more than what exponentials of another shift still show: 2**64.
TRUSTED = gl.constexpr(1.8446744073709552e19)
#: Two numbers of 16 bits into fp32: two instructions, where the compiler makes three for bf16, and keeps fp32
#: of what should stay in registers as 16 bits.
_BF16 = gl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")
_FP16 = gl.constexpr(
    "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }"
)


@gluon.jit
def _wide(raw):
    """fp32 of logits."""
    if raw.dtype == gl.bfloat16:
        out = gl.inline_asm_elementwise(_BF16, "=r,=r,r", [raw], dtype=gl.float32, is_pure=True, pack=2)
    else:
        out = gl.inline_asm_elementwise(_FP16, "=r,=r,r", [raw], dtype=gl.float32, is_pure=True, pack=2)
    return out


@gluon.jit
def _exponentials(raw, shift):
    """exp(raw - shift) in fp32, by one fused multiply-add and one power of two."""
    return gl.exp2(_wide(raw) * LOG2E - shift * LOG2E)


@gluon.jit
def _largest(
    ring, first, held, BLOCK: gl.constexpr, RING: gl.constexpr, SLOTS: gl.constexpr, LAYOUT: gl.constexpr
):
    """The maximum of a row that lies in the ring and in registers; 0 where that is -inf."""
    peak = gl.full([BLOCK], float("-inf"), gl.float32, LAYOUT)
    for number in gl.static_range(len(held)):
        peak = gl.maximum(peak, held[number].to(gl.float32))
    slot = first
    for _ in range(RING):
        peak = gl.maximum(peak, ring.index(slot).load(LAYOUT).to(gl.float32))
        slot = _next(slot, SLOTS)
    highest = gl.max(peak, axis=0)
    return gl.where(highest == float("-inf"), 0.0, highest)


@gluon.jit
def _again(
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
        slot = _next(slot, SLOTS)
    return gl.sum(total, axis=0)


@gluon.jit
def _gradient(raw, counts, lse, multiplier, BLOCK: gl.constexpr, LAYOUT: gl.constexpr):
    """The gradient of a chunk of columns, but for the label's part."""
    out = gl.zeros([BLOCK], gl.float32, LAYOUT)
    if counts:
        out = _exponentials(raw, lse) * multiplier
    return out


@gluon.jit
def _next(number, count: gl.constexpr):
    """The number after this one, of ``count`` in a circle."""
    return gl.where(number + 1 == count, 0, number + 1)


@gluon.jit
def _refill(ring, slot, logits, row, chunk, rows, stride, BLOCK: gl.constexpr, LAYOUT: gl.constexpr):
    """Start to copy a chunk of a row to its place in the ring, if there is such a row."""
    place = gl.arange(0, BLOCK, LAYOUT)
    source = logits + row.to(gl.int64) * stride + chunk * BLOCK + place
    async_copy.async_copy_global_to_shared(ring.index(slot), source, mask=(row < rows) & (place >= 0))
    async_copy.commit_group()


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
        _refill(ring, number, logits, ahead_row, ahead, rows, stride, BLOCK, LAYOUT)
        ahead_row = gl.where(ahead + 1 == RING, ahead_row + step, ahead_row)
        ahead = _next(ahead, RING)
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
                shift = _largest(ring, slot, held, BLOCK, RING, SLOTS, LAYOUT)
                mass = _again(ring, slot, held, shift, BLOCK, RING, SLOTS, LAYOUT)
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
        refill = logits + following.to(gl.int64) * stride
        fresh = ()
        for number in gl.static_range(HELD):
            column = (RING + number) * BLOCK + place
            inside = column < columns
            out = _gradient(held[number], counts, lse, multiplier, BLOCK, LAYOUT)
            gl.store(sink + column, out.to(gradient.dtype.element_ty), mask=inside, cache_modifier=".cs")
            fresh = fresh + (gl.load(refill + column, mask=inside & (following < rows), other=float("-inf")),)
        total = gl.zeros([BLOCK], gl.float32, LAYOUT)
        # where the next row begins
        coming = slot + RING
        if coming >= SLOTS:
            coming -= SLOTS
        for number in range(LAG):
            async_copy.wait_group(WAITING)
            raw = ring.index(slot).load(LAYOUT)
            _refill(ring, slot, logits, ahead_row, ahead, rows, stride, BLOCK, LAYOUT)
            out = _gradient(raw, counts, lse, multiplier, BLOCK, LAYOUT)
            gl.store(sink + number * BLOCK + place, out.to(gradient.dtype.element_ty), cache_modifier=".cs")
            slot = _next(slot, SLOTS)
            ahead_row = gl.where(ahead + 1 == RING, ahead_row + step, ahead_row)
            ahead = _next(ahead, RING)
        for number in range(LAG, RING):
            async_copy.wait_group(WAITING)
            raw = ring.index(slot).load(LAYOUT)
            new = ring.index(coming).load(LAYOUT)
            _refill(ring, slot, logits, ahead_row, ahead, rows, stride, BLOCK, LAYOUT)
            out = _gradient(raw, counts, lse, multiplier, BLOCK, LAYOUT)
            gl.store(sink + number * BLOCK + place, out.to(gradient.dtype.element_ty), cache_modifier=".cs")
            total += _exponentials(new, shift)
            slot = _next(slot, SLOTS)
            coming = _next(coming, SLOTS)
            ahead_row = gl.where(ahead + 1 == RING, ahead_row + step, ahead_row)
            ahead = _next(ahead, RING)
        for number in gl.static_range(HELD):
            total += _exponentials(fresh[number], shift)
        for number in gl.static_range(LAG):
            async_copy.wait_group(WAITING - 1 - number)
            total += _exponentials(ring.index(coming).load(LAYOUT), shift)
            coming = _next(coming, SLOTS)
        # after all threads' stores: the label's element is written again
        _barrier()
        if counts & (bad == 0):
            gl.store(sink + label, own.to(gradient.dtype.element_ty))
        held = fresh
        label = next_label
        chosen = next_chosen
        row = following
    async_copy.wait_group(0)
    if partials is not None:
        gl.store(partials + gl.program_id(0), kept)
