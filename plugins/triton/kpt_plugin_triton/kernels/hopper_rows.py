"""Rows of 16-bit numbers kept on one multiprocessor of sm_90: what kernels that walk over rows share.

A row lies in a ring of chunks of shared memory and, its end, in registers. Threads copy, read and replace
their own elements of a chunk alone, so that a ring needs no barriers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

#: Triton 3.6 calls it by another name.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

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
def wide_values(raw):
    """fp32 of numbers of 16 bits."""
    if raw.dtype == gl.bfloat16:
        out = gl.inline_asm_elementwise(_BF16, "=r,=r,r", [raw], dtype=gl.float32, is_pure=True, pack=2)
    else:
        out = gl.inline_asm_elementwise(_FP16, "=r,=r,r", [raw], dtype=gl.float32, is_pure=True, pack=2)
    return out


@gluon.jit
def largest(
    ring, first, held, BLOCK: gl.constexpr, RING: gl.constexpr, SLOTS: gl.constexpr, LAYOUT: gl.constexpr
):
    """The maximum of a row that lies in the ring and in registers; 0 where that is -inf."""
    peak = gl.full([BLOCK], float("-inf"), gl.float32, LAYOUT)
    for number in gl.static_range(len(held)):
        peak = gl.maximum(peak, held[number].to(gl.float32))
    slot = first
    for _ in range(RING):
        peak = gl.maximum(peak, ring.index(slot).load(LAYOUT).to(gl.float32))
        slot = next_of(slot, SLOTS)
    highest = gl.max(peak, axis=0)
    return gl.where(highest == float("-inf"), 0.0, highest)


@gluon.jit
def next_of(number, count: gl.constexpr):
    """The number after this one, of ``count`` in a circle."""
    return gl.where(number + 1 == count, 0, number + 1)


@gluon.jit
def refill(ring, slot, base, row, chunk, rows, stride, BLOCK: gl.constexpr, LAYOUT: gl.constexpr):
    """Start to copy a chunk of a row to its place in the ring, if there is such a row."""
    place = gl.arange(0, BLOCK, LAYOUT)
    source = base + row.to(gl.int64) * stride + chunk * BLOCK + place
    async_copy.async_copy_global_to_shared(ring.index(slot), source, mask=(row < rows) & (place >= 0))
    async_copy.commit_group()
