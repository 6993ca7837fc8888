"""Hopper: expert kernels whose loads run in warps of their own, up to a ring's depth ahead of the products.

One program per multiprocessor. A loading partition fills a ring of (A, B) stages: B, and A where its rows are
contiguous, by the bulk copy engine, gathered rows of A by 16-byte copies; the default partition multiplies and runs
the epilogue, while the ring already fills for the next tile. Sizes must be multiples of the tile (`launch` checks).
"""

# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LIMIT = gl.constexpr(2**30)


@gluon.jit
def _tile_of(tile, rows, columns, GROUP: gl.constexpr):
    width = GROUP * columns
    first = (tile // width) * GROUP
    height = gl.minimum(rows - first, GROUP)
    inside = tile % width
    return first + inside % height, inside // height


@gluon.jit
def _row_tile(tiles_ptr, index):
    base = tiles_ptr + index * 4
    return gl.load(base), gl.load(base + 1), gl.load(base + 2)


@gluon.jit
def _half(x, WHICH: gl.constexpr, LAYOUT: gl.constexpr):
    rows: gl.constexpr = x.shape[0]
    width: gl.constexpr = x.shape[1] // 2
    left, right = x.reshape((rows, 2, width)).permute((0, 2, 1)).split()
    return gl.convert_layout(right if WHICH else left, LAYOUT, assert_trivial=True)


@gluon.jit
def _multiply(acc, a_ring, b_ring, full, empty, step, count, TRANS_A: gl.constexpr, TRANS_B: gl.constexpr,
              STAGES: gl.constexpr, FENCE: gl.constexpr):  # fmt: skip
    """acc + the next `count` stages of the ring, from global step `step` on; each stage is freed when it is read.

    FENCE: stages that ordinary copies have filled, and that the products read through another proxy.
    """
    for k in range(count):
        slot = (step + k) % STAGES
        mbarrier.wait(full.index(slot), ((step + k) // STAGES) & 1)
        if FENCE:
            fence_async_shared()
        a, b = a_ring.index(slot), b_ring.index(slot)
        if TRANS_A:
            a = a.permute((1, 0))
        if TRANS_B:
            b = b.permute((1, 0))
        acc = warpgroup_mma(a, b, acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        mbarrier.arrive(empty.index((step + k + STAGES - 1) % STAGES), count=1, pred=k > 0)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    mbarrier.arrive(empty.index((step + count + STAGES - 1) % STAGES), count=1, pred=count > 0)
    return acc


@gluon.jit
def _quarter(x, INDEX: gl.constexpr):
    """Columns [INDEX, INDEX + 1) / 4 of an accumulator."""
    half: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, x.shape[1] // 2, 16])
    quarter: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, x.shape[1] // 4, 16])
    return _half(_half(x, INDEX // 2, half), INDEX % 2, quarter)


@gluon.jit
def _eighth(x, INDEX: gl.constexpr):
    """Columns [INDEX, INDEX + 1) / 8 of an accumulator."""
    eighth: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, x.shape[1] // 8, 16])
    return _half(_quarter(x, INDEX // 2), INDEX % 2, eighth)


@gluon.jit
def _fill(out, value):
    rows: gl.constexpr = value.shape[0]
    width: gl.constexpr = value.shape[1]
    out.reshape((rows, width)).store(value.to(out.dtype))


@gluon.jit
def _put(out_desc, out_ring, number, end, left, col, value, OUTS: gl.constexpr):
    """Write value (BM, width) through slot number % OUTS of a ring of shared buffers."""
    out = out_ring.index(number % OUTS)
    tma.store_wait(pendings=OUTS - 1)
    gl.thread_barrier()
    _fill(out, value)
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [LIMIT, end, LIMIT - left, col], out)


@gluon.jit
def _put_three(
    first_desc, second_desc, first, second, third, number, end, left, col, second_col, third_col, a, b, c,
    DEPTH: gl.constexpr,
):  # fmt: skip
    """Write a through first_desc, b and c through second_desc: three stores for one pair of barriers."""
    slot = number % DEPTH
    tma.store_wait(pendings=3 * (DEPTH - 1))
    gl.thread_barrier()
    _fill(first.index(slot), a)
    _fill(second.index(slot), b)
    _fill(third.index(slot), c)
    fence_async_shared()
    row = LIMIT - left
    tma.async_copy_shared_to_global(first_desc, [LIMIT, end, row, col], first.index(slot))
    tma.async_copy_shared_to_global(second_desc, [LIMIT, end, row, second_col], second.index(slot))
    tma.async_copy_shared_to_global(second_desc, [LIMIT, end, row, third_col], third.index(slot))


@gluon.jit
def _up_load(
    x_ptr, x_desc, copies_ptr, w_desc, tiles_ptr, num_tiles_ptr, a_ring, b_ring, full, empty, D, F,
    TOP_K: gl.constexpr, BM: gl.constexpr, BK: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, GRID: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows, columns = gl.load(num_tiles_ptr), F // HALF
    k_tiles = D // BK
    step = 0
    row = gl.arange(0, BM, layout=gl.SliceLayout(1, layout))
    col = gl.arange(0, BK, layout=gl.SliceLayout(0, layout))
    for tile in range(gl.program_id(0), rows * columns, GRID):
        m, n = _tile_of(tile, rows, columns, GROUP)
        expert, first, end = _row_tile(tiles_ptr, m)
        if TOP_K:
            token = gl.load(copies_ptr + gl.minimum(first + row, end - 1)) // TOP_K
            pointers = x_ptr + token.to(gl.int64)[:, None] * D + col[None, :]
        for k in range(k_tiles):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), 2 * w_desc.block_type.nbytes + (0 if TOP_K else BM * BK * 2))
            b = b_ring.index(slot)
            tma.async_copy_global_to_shared(
                w_desc, [expert * D + k * BK, n * HALF], full.index(slot), b.slice(0, HALF, dim=1)
            )
            tma.async_copy_global_to_shared(
                w_desc, [expert * D + k * BK, F + n * HALF], full.index(slot), b.slice(HALF, HALF, dim=1)
            )
            if TOP_K:
                async_copy.async_copy_global_to_shared(a_ring.index(slot), pointers + k * BK)
                async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
            else:
                tma.async_copy_global_to_shared(x_desc, [first, k * BK], full.index(slot), a_ring.index(slot))
            step += 1


@gluon.jit
def _up_compute(
    h_desc, act_desc, tiles_ptr, num_tiles_ptr, a_ring, b_ring, act_out, gate_out, up_out, full, empty, D, F,
    TOP_K: gl.constexpr, SAVE: gl.constexpr, BM: gl.constexpr, BK: gl.constexpr, HALF: gl.constexpr,
    STAGES: gl.constexpr, OUTS: gl.constexpr, GROUP: gl.constexpr, GRID: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 2 * HALF, 16])
    rows, columns = gl.load(num_tiles_ptr), F // HALF
    k_tiles = D // BK
    step, stores = 0, 0
    for tile in range(gl.program_id(0), rows * columns, GRID):
        m, n = _tile_of(tile, rows, columns, GROUP)
        _, first, end = _row_tile(tiles_ptr, m)
        acc = gl.zeros((BM, 2 * HALF), gl.float32, layout=mma)
        acc = _multiply(acc, a_ring, b_ring, full, empty, step, k_tiles, False, False, STAGES, TOP_K > 0)
        step += k_tiles
        for p in gl.static_range(4):
            g, u = _eighth(acc, p), _eighth(acc, 4 + p)
            col = n * HALF + p * (HALF // 4)
            act = g / (1.0 + gl.exp(-g)) * u
            if SAVE:
                _put_three(
                    act_desc, h_desc, act_out, gate_out, up_out, stores, end, end - first, col, col, F + col, act, g, u,
                    OUTS,
                )  # fmt: skip
            else:
                _put(act_desc, act_out, stores, end, end - first, col, act, OUTS)
            stores += 1
    tma.store_wait(pendings=0)


@gluon.jit
def _barriers(full, empty, STAGES: gl.constexpr, LOADS: gl.constexpr):
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=LOADS)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()


@gluon.jit
def up_specialised(
    x_ptr, x_desc, copies_ptr, w_desc, h_desc, act_desc, tiles_ptr, num_tiles_ptr, D, F,
    TOP_K: gl.constexpr, SAVE: gl.constexpr, BM: gl.constexpr, BK: gl.constexpr, HALF: gl.constexpr,
    STAGES: gl.constexpr, OUTS: gl.constexpr, GROUP: gl.constexpr, GRID: gl.constexpr,
):  # fmt: skip
    """SwiGLU `up_kernel` with one product of 2 * HALF columns a stage: HALF gate columns beside HALF up columns.

    TOP_K = 0: x_desc holds the rows in sorted order.
    """
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    a_ring = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BM, BK], tile_layout)
    b_ring = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BK, 2 * HALF], tile_layout)
    act_out = gl.allocate_shared_memory(w_desc.dtype, [OUTS, 1, 1, BM, HALF // 4], act_desc.layout)
    gate_out = gl.allocate_shared_memory(w_desc.dtype, [OUTS if SAVE else 1, 1, 1, BM, HALF // 4], act_desc.layout)
    up_out = gl.allocate_shared_memory(w_desc.dtype, [OUTS if SAVE else 1, 1, 1, BM, HALF // 4], act_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    _barriers(full, empty, STAGES, 129 if TOP_K else 1)
    gl.warp_specialize(
        [
            (_up_compute, (h_desc, act_desc, tiles_ptr, num_tiles_ptr, a_ring, b_ring, act_out, gate_out, up_out,
                           full, empty, D, F, TOP_K, SAVE, BM, BK, HALF, STAGES, OUTS, GROUP, GRID)),
            (_up_load, (x_ptr, x_desc, copies_ptr, w_desc, tiles_ptr, num_tiles_ptr, a_ring, b_ring, full, empty, D, F,
                        TOP_K, BM, BK, HALF, STAGES, GROUP, GRID)),
        ],
        [4], [64],
    )  # fmt: skip


@gluon.jit
def _rows_load(
    a_desc, w_desc, tiles_ptr, num_tiles_ptr, a_ring, b_ring, full, empty, K, N,
    TRANSPOSED: gl.constexpr, BK: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    GRID: gl.constexpr,
):  # fmt: skip
    rows, columns = gl.load(num_tiles_ptr), N // BN
    step = 0
    for tile in range(gl.program_id(0), rows * columns, GRID):
        m, n = _tile_of(tile, rows, columns, GROUP)
        expert, first, _ = _row_tile(tiles_ptr, m)
        for k in range(K // BK):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), a_desc.block_type.nbytes + w_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(a_desc, [first, k * BK], full.index(slot), a_ring.index(slot))
            if TRANSPOSED:
                tma.async_copy_global_to_shared(
                    w_desc, [expert * N + n * BN, k * BK], full.index(slot), b_ring.index(slot)
                )
            else:
                tma.async_copy_global_to_shared(
                    w_desc, [expert * K + k * BK, n * BN], full.index(slot), b_ring.index(slot)
                )
            step += 1


@gluon.jit
def _rows_compute(
    out_desc, tiles_ptr, num_tiles_ptr, a_ring, b_ring, out_ring, full, empty, K, N,
    TRANSPOSED: gl.constexpr, BM: gl.constexpr, BK: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    OUTS: gl.constexpr, GROUP: gl.constexpr, GRID: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BN, 16])
    rows, columns = gl.load(num_tiles_ptr), N // BN
    k_tiles = K // BK
    step, stores = 0, 0
    for tile in range(gl.program_id(0), rows * columns, GRID):
        m, n = _tile_of(tile, rows, columns, GROUP)
        _, first, end = _row_tile(tiles_ptr, m)
        acc = gl.zeros((BM, BN), gl.float32, layout=mma)
        acc = _multiply(acc, a_ring, b_ring, full, empty, step, k_tiles, False, TRANSPOSED, STAGES, False)
        step += k_tiles
        for p in gl.static_range(4):
            _put(out_desc, out_ring, stores, end, end - first, n * BN + p * (BN // 4), _quarter(acc, p), OUTS)
            stores += 1
    tma.store_wait(pendings=0)


@gluon.jit
def rows_specialised(
    a_desc, w_desc, out_desc, tiles_ptr, num_tiles_ptr, K, N,
    TRANSPOSED: gl.constexpr, BM: gl.constexpr, BK: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    OUTS: gl.constexpr, GROUP: gl.constexpr, GRID: gl.constexpr,
):  # fmt: skip
    """`rows_kernel`; BN = 256."""
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [STAGES, BM, BK], a_desc.layout)
    b_ring = gl.allocate_shared_memory(
        w_desc.dtype, [STAGES, BN if TRANSPOSED else BK, BK if TRANSPOSED else BN], w_desc.layout
    )
    out_ring = gl.allocate_shared_memory(out_desc.dtype, [OUTS, 1, 1, BM, BN // 4], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    _barriers(full, empty, STAGES, 1)
    gl.warp_specialize(
        [
            (_rows_compute, (out_desc, tiles_ptr, num_tiles_ptr, a_ring, b_ring, out_ring, full, empty, K, N,
                             TRANSPOSED, BM, BK, BN, STAGES, OUTS, GROUP, GRID)),
            (_rows_load, (a_desc, w_desc, tiles_ptr, num_tiles_ptr, a_ring, b_ring, full, empty, K, N,
                          TRANSPOSED, BK, BN, STAGES, GROUP, GRID)),
        ],
        [1], [40],
    )  # fmt: skip
