"""Hopper: the backward kernels of `specialised`: gradient through the activation, and weight gradients."""

# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma

from .specialised import LIMIT, _barriers, _eighth, _multiply, _put_three, _quarter, _row_tile, _tile_of


@gluon.jit
def _act_load(
    g_ptr, g_desc, copies_ptr, w_desc, tiles_ptr, num_tiles_ptr, a_ring, b_ring, full, empty, D, F,
    TOP_K: gl.constexpr, BM: gl.constexpr, BK: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, GRID: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [2, 1], [1, 0])
    rows, columns = gl.load(num_tiles_ptr), F // BN
    step = 0
    row = gl.arange(0, BM, layout=gl.SliceLayout(1, layout))
    col = gl.arange(0, BK, layout=gl.SliceLayout(0, layout))
    for tile in range(gl.program_id(0), rows * columns, GRID):
        m, n = _tile_of(tile, rows, columns, GROUP)
        expert, first, end = _row_tile(tiles_ptr, m)
        if TOP_K:
            token = gl.load(copies_ptr + gl.minimum(first + row, end - 1)) // TOP_K
            pointers = g_ptr + token.to(gl.int64)[:, None] * D + col[None, :]
        for k in range(D // BK):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), w_desc.block_type.nbytes + (0 if TOP_K else BM * BK * 2))
            tma.async_copy_global_to_shared(w_desc, [expert * F + n * BN, k * BK], full.index(slot), b_ring.index(slot))
            if TOP_K:
                async_copy.async_copy_global_to_shared(a_ring.index(slot), pointers + k * BK)
                async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
            else:
                tma.async_copy_global_to_shared(g_desc, [first, k * BK], full.index(slot), a_ring.index(slot))
            step += 1


@gluon.jit
def _act_load_h(
    h_desc, tiles_ptr, num_tiles_ptr, h_ring, h_full, h_empty, F,
    BN: gl.constexpr, SLOTS: gl.constexpr, GROUP: gl.constexpr, GRID: gl.constexpr,
):  # fmt: skip
    rows, columns = gl.load(num_tiles_ptr), F // BN
    step = 0
    for tile in range(gl.program_id(0), rows * columns, GRID):
        m, n = _tile_of(tile, rows, columns, GROUP)
        _, first, end = _row_tile(tiles_ptr, m)
        for p in range(8):
            slot = step % SLOTS
            col = n * BN + p * (BN // 8)
            mbarrier.wait(h_empty.index(slot), ((step // SLOTS) & 1) ^ 1)
            mbarrier.expect(h_full.index(slot), 2 * h_desc.block_type.nbytes)
            row = LIMIT - (end - first)
            tma.async_copy_global_to_shared(h_desc, [LIMIT, end, row, col], h_full.index(slot), h_ring.index(2 * slot))
            tma.async_copy_global_to_shared(
                h_desc, [LIMIT, end, row, F + col], h_full.index(slot), h_ring.index(2 * slot + 1)
            )
            step += 1


@gluon.jit
def _act_compute(
    copies_ptr, weight_ptr, dh_desc, act_desc, partial_ptr, tiles_ptr, num_tiles_ptr,
    a_ring, b_ring, act_out, gate_out, up_out, h_ring, full, empty, h_full, h_empty, D, F, N,
    TOP_K: gl.constexpr, BM: gl.constexpr, BK: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    OUTS: gl.constexpr, SLOTS: gl.constexpr, GROUP: gl.constexpr, GRID: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BN, 16])
    eighth: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BN // 8, 16])
    row: gl.constexpr = gl.SliceLayout(1, eighth)
    rows, columns = gl.load(num_tiles_ptr), F // BN
    k_tiles = D // BK
    step, stores, pieces = 0, 0, 0
    for tile in range(gl.program_id(0), rows * columns, GRID):
        m, n = _tile_of(tile, rows, columns, GROUP)
        _, first, end = _row_tile(tiles_ptr, m)
        offs = first + gl.arange(0, BM, layout=row)
        if TOP_K:
            copies = gl.load(copies_ptr + gl.minimum(offs, end - 1))
            weight = gl.load(weight_ptr + copies).to(gl.float32)[:, None]
        d = gl.zeros((BM, BN), gl.float32, layout=mma)
        d = _multiply(d, a_ring, b_ring, full, empty, step, k_tiles, False, True, STAGES, TOP_K > 0)
        step += k_tiles
        partial = gl.zeros((BM,), gl.float32, layout=row)
        for p in gl.static_range(8):
            col = n * BN + p * (BN // 8)
            slot = pieces % SLOTS
            mbarrier.wait(h_full.index(slot), (pieces // SLOTS) & 1)
            gate = h_ring.index(2 * slot).reshape((BM, BN // 8)).load(eighth).to(gl.float32)
            up = h_ring.index(2 * slot + 1).reshape((BM, BN // 8)).load(eighth).to(gl.float32)
            fence_async_shared()
            mbarrier.arrive(h_empty.index(slot), count=1)
            pieces += 1
            d_p = _eighth(d, p)
            s = 1.0 / (1.0 + gl.exp(-gate))
            silu = gate * s
            act = silu * up
            if TOP_K:
                partial += gl.sum(act * d_p, axis=1)
                d_p = d_p * weight
                act = act * weight
            _put_three(
                act_desc, dh_desc, act_out, gate_out, up_out, stores, end, end - first, col, col, F + col,
                act, d_p * up * (s + silu * (1.0 - s)), d_p * silu, OUTS,
            )  # fmt: skip
            stores += 1
        if TOP_K:
            gl.store(partial_ptr + n.to(gl.int64) * N + copies, partial, mask=offs < end)
    tma.store_wait(pendings=0)


@gluon.jit
def act_specialised(
    g_ptr, g_desc, copies_ptr, weight_ptr, w_desc, h_desc, dh_desc, act_desc, partial_ptr, tiles_ptr, num_tiles_ptr,
    D, F, N,
    TOP_K: gl.constexpr, BM: gl.constexpr, BK: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    OUTS: gl.constexpr, SLOTS: gl.constexpr, GROUP: gl.constexpr, GRID: gl.constexpr,
):  # fmt: skip
    """SwiGLU `activation_grad_kernel`; BN = 256. h comes in eighths of a tile through a ring of its own."""
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    a_ring = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BM, BK], tile_layout)
    b_ring = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BN, BK], w_desc.layout)
    act_out = gl.allocate_shared_memory(w_desc.dtype, [OUTS, 1, 1, BM, BN // 8], act_desc.layout)
    gate_out = gl.allocate_shared_memory(w_desc.dtype, [OUTS, 1, 1, BM, BN // 8], act_desc.layout)
    up_out = gl.allocate_shared_memory(w_desc.dtype, [OUTS, 1, 1, BM, BN // 8], act_desc.layout)
    h_ring = gl.allocate_shared_memory(w_desc.dtype, [2 * SLOTS, 1, 1, BM, BN // 8], h_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    h_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    h_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    _barriers(full, empty, STAGES, 65 if TOP_K else 1)
    _barriers(h_full, h_empty, SLOTS, 1)
    gl.warp_specialize(
        [
            (_act_compute, (copies_ptr, weight_ptr, dh_desc, act_desc, partial_ptr, tiles_ptr, num_tiles_ptr,
                            a_ring, b_ring, act_out, gate_out, up_out, h_ring, full, empty, h_full, h_empty, D, F, N,
                            TOP_K, BM, BK, BN, STAGES, OUTS, SLOTS, GROUP, GRID)),
            (_act_load, (g_ptr, g_desc, copies_ptr, w_desc, tiles_ptr, num_tiles_ptr, a_ring, b_ring, full, empty, D, F,
                         TOP_K, BM, BK, BN, STAGES, GROUP, GRID)),
            (_act_load_h, (h_desc, tiles_ptr, num_tiles_ptr, h_ring, h_full, h_empty, F, BN, SLOTS, GROUP, GRID)),
        ],
        [2, 1], [96, 96],
    )  # fmt: skip


@gluon.jit
def _snake(turn, GRID: gl.constexpr):
    """This program's tile in a turn: forwards, then backwards, so that falling tile lengths even out."""
    return turn * GRID + (gl.program_id(0) if turn % 2 == 0 else GRID - 1 - gl.program_id(0))


@gluon.jit
def _expert_tile(tile, order_ptr, offsets_ptr, rows, columns, GROUP: gl.constexpr):
    """(expert, first row, rows, m, n) of a weight-gradient tile, longest experts first."""
    expert = gl.load(order_ptr + tile // (rows * columns))
    m, n = _tile_of(tile % (rows * columns), rows, columns, GROUP)
    first = gl.load(offsets_ptr + expert)
    return expert, first, gl.load(offsets_ptr + expert + 1) - first, m, n


@gluon.jit
def _grad_load(
    gathered_ptr, gathered_desc, rows_desc, copies_ptr, order_ptr, offsets_ptr, a_ring, b_ring, full, empty, M, N,
    num_experts,
    GATHER_A: gl.constexpr, TOP_K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, GRID: gl.constexpr,
):  # fmt: skip
    WIDTH: gl.constexpr = BM if GATHER_A else BN
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    rows, columns = M // BM, N // BN
    step = 0
    row = gl.arange(0, BK, layout=gl.SliceLayout(1, layout))
    col = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    total = num_experts * rows * columns
    for turn in range(gl.cdiv(total, GRID)):
        tile = _snake(turn, GRID)
        _, first, count, m, n = _expert_tile(gl.minimum(tile, total - 1), order_ptr, offsets_ptr, rows, columns, GROUP)
        count = gl.where(tile < total, count, 0)
        if GATHER_A:
            base, stride, other = gathered_ptr + m * BM, M, n * BN
        else:
            base, stride, other = gathered_ptr + n * BN, N, m * BM
        own = m * BM if GATHER_A else n * BN
        if TOP_K:
            following = gl.load(copies_ptr + first + row, mask=row < count, other=0)
        for k in range(gl.cdiv(count, BK)):
            if TOP_K:
                token = following // TOP_K
                inside = (k * BK + row < count)[:, None]
                ahead = (k + 1) * BK + row
                following = gl.load(copies_ptr + first + ahead, mask=ahead < count, other=0)
                pointers = base + token.to(gl.int64)[:, None] * stride + col[None, :]
                inside, pointers = gl.broadcast(inside, pointers)
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), rows_desc.block_type.nbytes + (0 if TOP_K else WIDTH * BK * 2))
            place = [LIMIT, first + count, LIMIT - count + k * BK, other]
            if GATHER_A:
                target, gathered = b_ring.index(slot), a_ring.index(slot)
            else:
                target, gathered = a_ring.index(slot), b_ring.index(slot)
            tma.async_copy_global_to_shared(
                rows_desc, place, full.index(slot), target.reshape(rows_desc.block_type.shape)
            )
            if TOP_K:
                async_copy.async_copy_global_to_shared(gathered, pointers, mask=inside)
                async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
            else:
                place = [LIMIT, first + count, LIMIT - count + k * BK, own]
                gathered = gathered.reshape(gathered_desc.block_type.shape)
                tma.async_copy_global_to_shared(gathered_desc, place, full.index(slot), gathered)
            step += 1


@gluon.jit
def _grad_compute(
    out_desc, order_ptr, offsets_ptr, a_ring, b_ring, out_ring, full, empty, M, N, num_experts,
    TOP_K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    OUTS: gl.constexpr, GROUP: gl.constexpr, GRID: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BN, 16])
    rows, columns = M // BM, N // BN
    step, stores = 0, 0
    total = num_experts * rows * columns
    for turn in range(gl.cdiv(total, GRID)):
        tile = _snake(turn, GRID)
        expert, _, count, m, n = _expert_tile(gl.minimum(tile, total - 1), order_ptr, offsets_ptr, rows, columns, GROUP)
        count = gl.where(tile < total, count, 0)
        k_tiles = gl.cdiv(count, BK)
        acc = gl.zeros((BM, BN), gl.float32, layout=mma)
        acc = _multiply(acc, a_ring, b_ring, full, empty, step, k_tiles, True, False, STAGES, TOP_K > 0)
        step += k_tiles
        if tile < total:
            for p in gl.static_range(4):
                out = out_ring.index(stores % OUTS)
                tma.store_wait(pendings=OUTS - 1)
                gl.thread_barrier()
                out.store(_quarter(acc, p).to(out_desc.dtype))
                fence_async_shared()
                tma.async_copy_shared_to_global(out_desc, [expert * M + m * BM, n * BN + p * (BN // 4)], out)
                stores += 1
    tma.store_wait(pendings=0)


@gluon.jit
def weight_grad_specialised(
    gathered_ptr, gathered_desc, rows_desc, copies_ptr, out_desc, order_ptr, offsets_ptr, M, N, num_experts,
    GATHER_A: gl.constexpr, TOP_K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, OUTS: gl.constexpr, GROUP: gl.constexpr, GRID: gl.constexpr,
):  # fmt: skip
    """`weight_grad_kernel`. rows_desc, ragged: the operand that is never gathered; TOP_K = 0: neither is."""
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    a_ring = gl.allocate_shared_memory(out_desc.dtype, [STAGES, BK, BM], tile_layout)
    b_ring = gl.allocate_shared_memory(out_desc.dtype, [STAGES, BK, BN], tile_layout)
    out_ring = gl.allocate_shared_memory(out_desc.dtype, [OUTS, BM, BN // 4], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    _barriers(full, empty, STAGES, 129 if TOP_K else 1)
    gl.warp_specialize(
        [
            (_grad_compute, (out_desc, order_ptr, offsets_ptr, a_ring, b_ring, out_ring, full, empty, M, N,
                             num_experts, TOP_K, BM, BN, BK, STAGES, OUTS, GROUP, GRID)),
            (_grad_load, (gathered_ptr, gathered_desc, rows_desc, copies_ptr, order_ptr, offsets_ptr, a_ring, b_ring,
                          full, empty, M, N, num_experts, GATHER_A, TOP_K, BM, BN, BK, STAGES, GROUP, GRID)),
        ],
        [4], [96],
    )  # fmt: skip
