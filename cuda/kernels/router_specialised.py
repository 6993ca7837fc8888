"""Hopper: the router with loads in a warp of their own; a tile of x serves all terms of w, scores stay in registers.

The price of sharing x: a tensor core cuts a sum's last bits off at each addition, and here all terms are added to a sum
that is already large (`router_kernels` adds the small terms first): three times as many cuts that count.
"""

# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .specialised import _barriers, _eighth, _half, _quarter

LOWEST = gl.constexpr(-3.0e38)
"""What NaN and minus infinity count as: above the minus infinity of what is already taken or absent."""
BEYOND = gl.constexpr(2**30)
"""Above every id."""


@gluon.jit
def _load(
    x_desc, w_desc, x_ring, w_ring, x_full, x_empty, w_full, w_empty, tiles, heads, D, E,
    TERMS: gl.constexpr, BM: gl.constexpr, BE: gl.constexpr, BK: gl.constexpr, XS: gl.constexpr, WS: gl.constexpr,
    GRID: gl.constexpr,
):  # fmt: skip
    x_step, w_step = 0, 0
    for tile in range(gl.program_id(0), tiles * heads, GRID):
        row, head = (tile % tiles) * BM, tile // tiles
        for first in range(0, E, BE):
            for k in range(0, D, BK):
                slot = x_step % XS
                mbarrier.wait(x_empty.index(slot), ((x_step // XS) & 1) ^ 1)
                mbarrier.expect(x_full.index(slot), x_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(x_desc, [row, head * D + k], x_full.index(slot), x_ring.index(slot))
                x_step += 1
                for i in gl.static_range(TERMS):
                    slot = w_step % WS
                    mbarrier.wait(w_empty.index(slot), ((w_step // WS) & 1) ^ 1)
                    mbarrier.expect(w_full.index(slot), w_desc.block_type.nbytes)
                    place = [((TERMS - 1 - i) * heads + head) * D + k, first]
                    tma.async_copy_global_to_shared(w_desc, place, w_full.index(slot), w_ring.index(slot))
                    w_step += 1


@gluon.jit
def _logits(
    acc, x_ring, w_ring, x_full, x_empty, w_full, w_empty, x_step, w_step, count,
    TERMS: gl.constexpr, XS: gl.constexpr, WS: gl.constexpr,
):  # fmt: skip
    """acc + x @ (sum of the terms of w) over `count` tiles of the width, the smallest term of each first."""
    for k in range(count):
        slot = (x_step + k) % XS
        mbarrier.wait(x_full.index(slot), ((x_step + k) // XS) & 1)
        for i in gl.static_range(TERMS):
            step = w_step + k * TERMS + i
            mbarrier.wait(w_full.index(step % WS), (step // WS) & 1)
            acc = warpgroup_mma(x_ring.index(slot), w_ring.index(step % WS), acc, is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
            mbarrier.arrive(w_empty.index((step + WS - 1) % WS), count=1, pred=k + i > 0)
            if i == 0:
                mbarrier.arrive(x_empty.index((x_step + k + XS - 1) % XS), count=1, pred=k > 0)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    mbarrier.arrive(w_empty.index((w_step + count * TERMS + WS - 1) % WS), count=1)
    mbarrier.arrive(x_empty.index((x_step + count + XS - 1) % XS), count=1)
    return acc


@gluon.jit
def _piece(x, INDEX: gl.constexpr, PIECES: gl.constexpr):
    """Columns [INDEX, INDEX + 1) / PIECES of an accumulator."""
    if PIECES == 1:
        return x
    elif PIECES == 2:
        return _half(x, INDEX, gl.NVMMADistributedLayout([3, 0], [8, 1], [16, x.shape[1] // 2, 16]))
    elif PIECES == 4:
        return _quarter(x, INDEX)
    else:
        return _eighth(x, INDEX)


@gluon.jit
def _keep(best, best_logit, best_id, worst, logits, column, bias_ptr, E, BIASED: gl.constexpr):
    """The best so far and `worst`, the least score among them, after columns `column` of logits.

    Best scores are taken out of the piece until no row has one above its worst; a tie keeps the lower id.
    """
    small: gl.constexpr = best.type.layout
    rows: gl.constexpr = gl.SliceLayout(1, small)
    scores = logits
    if BIASED:
        scores += gl.load(bias_ptr + column, mask=column < E, other=0.0)[None, :]
    scores = gl.where(scores > LOWEST, scores, LOWEST)
    scores = gl.where((column < E)[None, :], scores, float("-inf"))
    here = gl.max(scores, axis=1)
    top = gl.convert_layout(here, rows, assert_trivial=True)
    more = gl.max((top > worst).to(gl.int32), axis=0)
    while more > 0:
        there = gl.min(gl.where(scores == here[:, None], column[None, :], BEYOND), axis=1)
        at = column[None, :] == there[:, None]
        drop = gl.max(gl.where(best == worst[:, None], best_id, -BEYOND), axis=1)
        put = (best_id == drop[:, None]) & (top > worst)[:, None]
        best = gl.where(put, top[:, None], best)
        best_id = gl.where(put, gl.convert_layout(there, rows, assert_trivial=True)[:, None], best_id)
        if BIASED:
            logit = gl.sum(gl.where(at, logits, 0.0), axis=1)
            best_logit = gl.where(put, gl.convert_layout(logit, rows, assert_trivial=True)[:, None], best_logit)
        worst = gl.min(best, axis=1)
        scores = gl.where(at, float("-inf"), scores)
        here = gl.max(scores, axis=1)
        top = gl.convert_layout(here, rows, assert_trivial=True)
        more = gl.max((top > worst).to(gl.int32), axis=0)
    return best, best_logit, best_id, worst


@gluon.jit
def _in_order(best, best_logit, best_id, slot, K: gl.constexpr):
    """(logits, ids), best first, ties to the lower id."""
    best = gl.where(slot < K, best, float("-inf"))
    logits, ids = best_logit, best_id
    for j in gl.static_range(K):
        top = gl.max(best, axis=1)
        chosen = gl.min(gl.where(best == top[:, None], best_id, BEYOND), axis=1)
        at = best_id == chosen[:, None]
        logit = gl.max(gl.where(at, best_logit, float("-inf")), axis=1)
        best = gl.where(at, float("-inf"), best)
        logits = gl.where(slot == j, logit[:, None], logits)
        ids = gl.where(slot == j, chosen[:, None], ids)
    return logits, ids


@gluon.jit
def _choose(
    bias_ptr, logits_ptr, ids_ptr, x_ring, w_ring, x_full, x_empty, w_full, w_empty, tiles, N, heads, D, E,
    K: gl.constexpr, SLOTS: gl.constexpr, TERMS: gl.constexpr, BIASED: gl.constexpr, GIVEN: gl.constexpr,
    PIECES: gl.constexpr, BM: gl.constexpr, BE: gl.constexpr, BK: gl.constexpr, XS: gl.constexpr, WS: gl.constexpr,
    GRID: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BE, 16])
    part: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BE // PIECES, 16])
    small: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, SLOTS, 16])
    slot = gl.arange(0, SLOTS, layout=gl.SliceLayout(0, small))[None, :]
    rows = gl.arange(0, BM, layout=gl.SliceLayout(1, small))
    inside = gl.arange(0, BE // PIECES, layout=gl.SliceLayout(0, part))
    x_step, w_step = 0, 0
    count = D // BK
    for tile in range(gl.program_id(0), tiles * heads, GRID):
        row, head = (tile % tiles) * BM + rows, tile // tiles
        place = (row.to(gl.int64)[:, None] * heads + head) * K + slot
        mask = (row < N)[:, None] & (slot < K)
        best = gl.where(slot < K, float("-inf"), float("inf")) + gl.zeros((BM, SLOTS), gl.float32, layout=small)
        best_logit = gl.zeros((BM, SLOTS), gl.float32, layout=small)
        best_id = -1 - slot + gl.zeros((BM, SLOTS), gl.int32, layout=small)
        worst = gl.min(best, axis=1)
        if GIVEN:
            best_id = gl.load(ids_ptr + place, mask=mask, other=-1).to(gl.int32)
        for first in range(0, E, BE):
            acc = gl.zeros((BM, BE), gl.float32, layout=mma)
            acc = _logits(acc, x_ring, w_ring, x_full, x_empty, w_full, w_empty, x_step, w_step, count, TERMS, XS, WS)
            x_step += count
            w_step += count * TERMS
            for p in gl.static_range(PIECES):
                logits = _piece(acc, p, PIECES)
                column = first + p * (BE // PIECES) + inside
                if GIVEN:
                    for j in range(K):
                        wanted = gl.max(gl.where(slot == j, best_id, -1), axis=1)
                        wanted = gl.convert_layout(wanted, gl.SliceLayout(1, part), assert_trivial=True)
                        own = gl.sum(gl.where(column[None, :] == wanted[:, None], logits, 0.0), axis=1)
                        own = gl.convert_layout(own, gl.SliceLayout(1, small), assert_trivial=True)
                        best_logit += gl.where(slot == j, own[:, None], 0.0)
                else:
                    best, best_logit, best_id, worst = _keep(
                        best, best_logit, best_id, worst, logits, column, bias_ptr + head * E, E, BIASED
                    )
        if GIVEN:
            gl.store(logits_ptr + place, best_logit, mask=mask)
        else:
            if not BIASED:
                best_logit = gl.where(best > LOWEST, best, float("-inf"))
            best_logit, best_id = _in_order(best, best_logit, best_id, slot, K)
            gl.store(logits_ptr + place, best_logit, mask=mask)
            gl.store(ids_ptr + place, best_id.to(gl.int64), mask=mask)


@gluon.jit
def router_specialised(
    x_desc, w_desc, bias_ptr, logits_ptr, ids_ptr, tiles, N, heads, D, E,
    K: gl.constexpr, SLOTS: gl.constexpr, TERMS: gl.constexpr, BIASED: gl.constexpr, GIVEN: gl.constexpr,
    PIECES: gl.constexpr, BM: gl.constexpr, BE: gl.constexpr, BK: gl.constexpr, XS: gl.constexpr, WS: gl.constexpr,
    GRID: gl.constexpr,
):  # fmt: skip
    """`choose_kernel`, or `given_kernel` if GIVEN: the same bits from both; a chosen NaN may be minus infinity.

    tiles: of BM rows; D a multiple of BK; SLOTS: 8 or 16, at least K. XS, WS: depth of the rings of x and of w.
    """
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [XS, BM, BK], x_desc.layout)
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [WS, BK, BE], w_desc.layout)
    x_full = gl.allocate_shared_memory(gl.int64, [XS, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [XS, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [WS, 1], mbarrier.MBarrierLayout())
    w_empty = gl.allocate_shared_memory(gl.int64, [WS, 1], mbarrier.MBarrierLayout())
    _barriers(x_full, x_empty, XS, 1)
    _barriers(w_full, w_empty, WS, 1)
    gl.warp_specialize(
        [
            (_choose, (bias_ptr, logits_ptr, ids_ptr, x_ring, w_ring, x_full, x_empty, w_full, w_empty, tiles, N, heads,
                       D, E, K, SLOTS, TERMS, BIASED, GIVEN, PIECES, BM, BE, BK, XS, WS, GRID)),
            (_load, (x_desc, w_desc, x_ring, w_ring, x_full, x_empty, w_full, w_empty, tiles, heads, D, E,
                     TERMS, BM, BE, BK, XS, WS, GRID)),
        ],
        [1], [40],
    )  # fmt: skip
