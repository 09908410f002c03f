"""Attention forward for multiprocessors of sm_90: one warp loads, two groups of four multiply.

The order of work is that of FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608): a group of warps owns 64
queries; the product of queries with the next block of keys and that of weights with the last block of values
are both under way while it takes exponentials. Keys and values come through rings in shared memory, which
one warp fills. A program walks over blocks of queries, the longest first.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kpt_plugin_triton.kernels import attention

_place_in_section = gluon.jit(attention.place_in_section.fn)
#: Triton 3.6 calls it by another name.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
#: Queries of one group of warps.
ROWS = gl.constexpr(64)


@gluon.jit
def _number(turn, snake):
    """The tile of a program's turn; with ``snake``, every other turn goes through the programs backwards."""
    program = gl.program_id(0)
    back = gl.num_programs(0) - 1 - program
    return turn * gl.num_programs(0) + gl.where((turn & snake) == 1, back, program)


@gluon.jit
def _turns(tiles, snake):
    """How many tiles a program has."""
    whole = tiles // gl.num_programs(0)
    return whole + gl.where(_number(whole, snake) < tiles, 1, 0)


@gluon.jit
def _tile(turn, snake, blocks, all_heads, section, k_len, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """(first query, batch x head, key blocks) of a program's turn; the longest come first."""
    block, both = _place_in_section(_number(turn, snake), blocks, all_heads, section)
    count = gl.cdiv(k_len, BLOCK_N)
    if CAUSAL:
        block = blocks - 1 - block
        count = gl.minimum(count, gl.cdiv((block + 1) * 2 * ROWS, BLOCK_N))
    return block * 2 * ROWS, both, count


@gluon.jit
def _fetch(source, ring, full, empty, batch, head, block, at, BLOCK_N: gl.constexpr, HEAD: gl.constexpr,
           STAGES: gl.constexpr):  # fmt: skip
    """Load a block of keys or values, the ``at``-th of all, once its place in the ring is free."""
    LAYOUT: gl.constexpr = source.layout
    stage = at % STAGES
    mbarrier.wait(empty.index(stage), (at // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(stage), BLOCK_N * HEAD * 2)
    tile = ring.index(stage)._reinterpret(source.dtype, [1, 1, BLOCK_N, HEAD], LAYOUT)
    tma.async_copy_global_to_shared(source, [batch, head, block * BLOCK_N, 0], full.index(stage), tile)


@gluon.jit
def _load(queries, keys, values, q_tiles, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty,
          heads, all_heads, blocks, section, snake, k_len, HEAD: gl.constexpr, GROUP: gl.constexpr,
          CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """The warp that loads: keys and values from the last block to the first, as the others take them."""
    Q_LAYOUT: gl.constexpr = queries.layout
    at = 0
    for turn in range(_turns(blocks * all_heads, snake)):
        start, both, count = _tile(turn, snake, blocks, all_heads, section, k_len, BLOCK_N, CAUSAL)
        batch = both // heads
        head = both % heads
        k_head = head // GROUP
        for half in gl.static_range(2):
            mbarrier.wait(q_empty.index(half), (turn & 1) ^ 1)
            mbarrier.expect(q_full.index(half), ROWS * HEAD * 2)
            tile = q_tiles.index(half)._reinterpret(queries.dtype, [1, 1, ROWS, HEAD], Q_LAYOUT)
            tma.async_copy_global_to_shared(
                queries, [batch, head, start + half * ROWS, 0], q_full.index(half), tile
            )
        for done in range(count + 1):
            block = count - 1 - done
            if done < count:
                _fetch(keys, k_ring, k_full, k_empty, batch, k_head, block, at, BLOCK_N, HEAD, STAGES)
            if done > 0:
                _fetch(
                    values, v_ring, v_full, v_empty, batch, k_head, block + 1, at - 1, BLOCK_N, HEAD, STAGES
                )
            at += 1
        at -= 1


@gluon.jit
def _softmax(scores, peak, total, scale):
    """(weights, new maxima, new sums, what older sums are multiplied by)."""
    higher = gl.maximum(peak, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - higher[:, None])
    shrink = gl.exp2(peak - higher)
    return weights, higher, total * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def _attend(half: gl.constexpr, outputs, q_tiles, k_ring, v_ring, o_tiles, q_full, q_empty, k_full, k_empty,
            v_full, v_empty, stats, heads, all_heads, blocks, section, snake, q_len, k_len, stats_b, stats_h,
            scale, HEAD: gl.constexpr, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr,
            STAGES: gl.constexpr):  # fmt: skip
    """A group of four warps: its half of the queries of each tile."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    OUT_LAYOUT: gl.constexpr = outputs.layout
    dtype: gl.constexpr = outputs.dtype
    queries = q_tiles.index(half)
    out_tile = o_tiles.index(half)
    at = 0
    none = gl.zeros([ROWS, BLOCK_N], gl.float32, S_LAYOUT)
    for turn in range(_turns(blocks * all_heads, snake)):
        start, both, count = _tile(turn, snake, blocks, all_heads, section, k_len, BLOCK_N, CAUSAL)
        row = start + half * ROWS + gl.arange(0, ROWS, S_ROWS)
        mbarrier.wait(q_full.index(half), turn & 1)
        stage = at % STAGES
        mbarrier.wait(k_full.index(stage), at // STAGES & 1)
        scores = warpgroup_mma(
            queries, k_ring.index(stage).permute((1, 0)), none, use_acc=False, is_async=True
        )
        scores = warpgroup_mma_wait(0, (scores,))
        _barrier()
        mbarrier.arrive(k_empty.index(stage), count=1)
        column = (count - 1) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, S_LAYOUT))
        last = gl.minimum(row, k_len - 1) if CAUSAL else row * 0 + (k_len - 1)
        scores = gl.where(column[None, :] <= last[:, None], scores, float("-inf"))
        peak = gl.full([ROWS], float("-inf"), gl.float32, S_ROWS)
        total = gl.zeros([ROWS], gl.float32, S_ROWS)
        weights, peak, total, shrink = _softmax(scores, peak, total, scale)
        out = gl.zeros([ROWS, HEAD], gl.float32, O_LAYOUT)
        held = gl.convert_layout(weights.to(dtype), P_LAYOUT)
        v_stage = stage
        v_phase = at // STAGES & 1
        at += 1
        stage = at % STAGES
        mbarrier.wait(k_full.index(stage), at // STAGES & 1, pred=count > 1)
        for done in range(1, count):
            scores = warpgroup_mma(
                queries, k_ring.index(stage).permute((1, 0)), none, use_acc=False, is_async=True
            )
            mbarrier.wait(v_full.index(v_stage), v_phase)
            out = warpgroup_mma(held, v_ring.index(v_stage), out, is_async=True)
            scores = warpgroup_mma_wait(1, (scores,))
            _barrier()
            mbarrier.arrive(k_empty.index(stage), count=1)
            weights, peak, total, shrink = _softmax(scores, peak, total, scale)
            held = gl.convert_layout(weights.to(dtype), P_LAYOUT)
            # The next keys are waited for here, because the assembler puts exponentials off until after the
            # products, if there is no branch between them.
            last_stage = v_stage
            v_stage = stage
            v_phase = at // STAGES & 1
            at += 1
            stage = at % STAGES
            mbarrier.wait(k_full.index(stage), at // STAGES & 1, pred=done < count - 1)
            out, held = warpgroup_mma_wait(0, (out, held))
            _barrier()
            mbarrier.arrive(v_empty.index(last_stage), count=1)
            out = out * gl.convert_layout(shrink, O_ROWS)[:, None]
        _barrier()
        mbarrier.arrive(q_empty.index(half), count=1)
        mbarrier.wait(v_full.index(v_stage), v_phase)
        out = warpgroup_mma(held, v_ring.index(v_stage), out, is_async=True)
        out = warpgroup_mma_wait(0, (out,))
        _barrier()
        mbarrier.arrive(v_empty.index(v_stage), count=1)
        out = out * gl.convert_layout(1.0 / total, O_ROWS)[:, None]
        tma.store_wait(0)
        _barrier()
        out_tile.store(out.to(dtype))
        fence_async_shared()
        _barrier()
        batch = both // heads
        head = both % heads
        tma.async_copy_shared_to_global(
            outputs,
            [batch, head, start + half * ROWS, 0],
            out_tile._reinterpret(dtype, [1, 1, ROWS, HEAD], OUT_LAYOUT),
        )
        if stats is not None:
            place = stats + batch.to(gl.int64) * stats_b + head.to(gl.int64) * stats_h + row
            gl.store(place, peak + gl.log2(total), mask=row < q_len)
    tma.store_wait(0)


_VARYING = ["batches", "heads", "key_heads", "all_heads", "blocks", "section", "snake", "q_len", "k_len"]


@gluon.jit(do_not_specialize=_VARYING)
def attention_forward_hopper(
    q, k, v, out, stats,
    batches, heads, key_heads, all_heads, blocks, section, snake, q_len, k_len,
    q_b, q_h, q_r, k_b, k_h, k_r, v_b, v_h, v_r, out_b, out_h, out_r,
    stats_b, stats_h, scale,
    HEAD: gl.constexpr, GROUP: gl.constexpr, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """``scale`` includes log2(e); ``blocks`` of 128 queries; ``stats`` as for the other forward kernel."""
    dtype: gl.constexpr = q.dtype.element_ty
    FOUR: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
    TWO: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    queries = tma.make_tensor_descriptor(
        q, [batches, heads, q_len, HEAD], [q_b, q_h, q_r, 1], [1, 1, ROWS, HEAD], FOUR
    )
    keys = tma.make_tensor_descriptor(
        k, [batches, key_heads, k_len, HEAD], [k_b, k_h, k_r, 1], [1, 1, BLOCK_N, HEAD], FOUR
    )
    values = tma.make_tensor_descriptor(
        v, [batches, key_heads, k_len, HEAD], [v_b, v_h, v_r, 1], [1, 1, BLOCK_N, HEAD], FOUR
    )
    outputs = tma.make_tensor_descriptor(
        out, [batches, heads, q_len, HEAD], [out_b, out_h, out_r, 1], [1, 1, ROWS, HEAD], FOUR
    )
    q_tiles = gl.allocate_shared_memory(dtype, [2, ROWS, HEAD], TWO)
    o_tiles = gl.allocate_shared_memory(dtype, [2, ROWS, HEAD], TWO)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD], TWO)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD], TWO)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for half in gl.static_range(2):
        mbarrier.init(q_full.index(half), count=1)
        mbarrier.init(q_empty.index(half), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_attend, (0, outputs, q_tiles, k_ring, v_ring, o_tiles, q_full, q_empty, k_full, k_empty,
                       v_full, v_empty, stats, heads, all_heads, blocks, section, snake, q_len, k_len,
                       stats_b, stats_h, scale, HEAD, CAUSAL, BLOCK_N, STAGES)),
            (_attend, (1, outputs, q_tiles, k_ring, v_ring, o_tiles, q_full, q_empty, k_full, k_empty,
                       v_full, v_empty, stats, heads, all_heads, blocks, section, snake, q_len, k_len,
                       stats_b, stats_h, scale, HEAD, CAUSAL, BLOCK_N, STAGES)),
            (_load, (queries, keys, values, q_tiles, k_ring, v_ring, q_full, q_empty, k_full, k_empty,
                     v_full, v_empty, heads, all_heads, blocks, section, snake, k_len, HEAD, GROUP,
                     CAUSAL, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
