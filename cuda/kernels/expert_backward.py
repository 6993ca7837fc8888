"""Backward GEMMs: gradient through the activation, and weight gradients over ragged rows."""

from __future__ import annotations

import triton
import triton.language as tl

from .ragged import load_part, load_rows, store_part, store_rows
from .tiles import gelu, gelu_slope, piece, row_tile, silu_parts, swizzle


@triton.jit
def activation_grad_kernel(
    g_ptr, g_desc, copies_ptr, weight_ptr, w_desc, h_desc, dh_desc, act_desc, partial_ptr, tiles_ptr, num_tiles_ptr,
    D, F, N,
    TOP_K: tl.constexpr, GATED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, GRID: tl.constexpr,
    FLATTEN: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """From the output's gradient g to dh and to the activation, which is rebuilt from h.

    d = g[token] @ w_down[e]^T; dh = weight * d * f'(h); act = weight * f(h), the operand of w_down's gradient;
    partial[j, copy] = sum of f(h) * d over the columns of tile j: summed over j, the routing weight's gradient.
    TOP_K = 0: g_desc holds the rows in sorted order, every weight is one, no partial. w_desc over (E * F, D), box
    (BN, BK); weight (N,) by copy; partial (ceil(F / BN), N) float32. h_desc and
    dh_desc, over (N, 2 or 1, F), and act_desc, over (N, F), are ragged, with boxes of BN / PIECES columns.
    """
    rows = tl.load(num_tiles_ptr)
    columns = tl.cdiv(F, BN)
    k_tiles = tl.cdiv(D, BK)
    width: tl.constexpr = BN // PIECES
    for tile in tl.range(tl.program_id(0), rows * columns, GRID, flatten=FLATTEN):
        m, n = swizzle(tile, rows, columns, GROUP)
        expert, first, end = row_tile(tiles_ptr, m)
        offs = first + tl.arange(0, BM)
        if TOP_K:
            copies = tl.load(copies_ptr + tl.minimum(offs, end - 1))
            token = (copies // TOP_K).to(tl.int64)
            a_ptrs = g_ptr + token[:, None] * D + tl.arange(0, BK)[None, :]
        d = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(0, k_tiles):
            a = tl.load(a_ptrs + k * BK) if TOP_K else g_desc.load([first, k * BK])
            d = tl.dot(a, w_desc.load([expert * F + n * BN, k * BK]).T, d)
        if TOP_K:
            weight = tl.load(weight_ptr + copies).to(tl.float32)[:, None]
            partial = tl.zeros((BM,), tl.float32)
        for p in tl.static_range(PIECES):
            col = n * BN + p * width
            d_p = piece(d, p, PIECES)
            gate = load_part(h_desc, end, end - first, 0, col, BM, width)
            if GATED:
                up = load_part(h_desc, end, end - first, 1, col, BM, width)
                s, silu = silu_parts(gate)
                act = silu * up
            else:
                act = gelu(gate)
            if TOP_K:
                partial += tl.sum(act * d_p, axis=1)
                d_p = d_p * weight
                act = act * weight
            store_rows(act_desc, end, end - first, col, act)
            if GATED:
                store_part(dh_desc, end, end - first, 1, col, d_p * silu)
                store_part(dh_desc, end, end - first, 0, col, d_p * up * (s + silu * (1.0 - s)))
            else:
                store_part(dh_desc, end, end - first, 0, col, d_p * gelu_slope(gate))
        if TOP_K:
            tl.store(partial_ptr + n.to(tl.int64) * N + copies, partial, mask=offs < end)


@triton.jit
def weight_grad_kernel(
    a_ptr, a_desc, b_ptr, b_desc, copies_ptr, out_ptr, order_ptr, offsets_ptr, M, N, num_experts,
    TOP_K: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, GROUP: tl.constexpr, GRID: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """out[e] = a_e^T @ b_e over each expert's rows, longest experts first; empty experts get exact zeros.

    a (rows or T, M), b (rows or T, N): one may be gathered, by token = copy // TOP_K; the descriptors are ragged, so
    that rows of the next expert read as zeros. order (E,): experts by falling row count. out (E, M, N).
    """
    rows = tl.cdiv(M, BM)
    columns = tl.cdiv(N, BN)
    per_expert = rows * columns
    for tile in tl.range(tl.program_id(0), num_experts * per_expert, GRID, flatten=FLATTEN):
        expert = tl.load(order_ptr + tile // per_expert)
        m, n = swizzle(tile % per_expert, rows, columns, GROUP)
        first = tl.load(offsets_ptr + expert)
        count = tl.load(offsets_ptr + expert + 1) - first
        a_cols = m * BM + tl.arange(0, BM)
        b_cols = n * BN + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(0, tl.cdiv(count, BK)):
            if GATHER_A or GATHER_B:
                offs = k * BK + tl.arange(0, BK)
                inside = offs < count
                copies = tl.load(copies_ptr + first + offs, mask=inside, other=0)
                token = (copies // TOP_K).to(tl.int64)
            if GATHER_A:
                a_mask = inside[:, None] & (a_cols < M)[None, :]
                a = tl.load(a_ptr + token[:, None] * M + a_cols[None, :], mask=a_mask, other=0.0)
            else:
                a = load_rows(a_desc, first + count, count, k * BK, m * BM, BK, BM)
            if GATHER_B:
                b_mask = inside[:, None] & (b_cols < N)[None, :]
                b = tl.load(b_ptr + token[:, None] * N + b_cols[None, :], mask=b_mask, other=0.0)
            else:
                b = load_rows(b_desc, first + count, count, k * BK, n * BN, BK, BN)
            acc = tl.dot(a.T, b, acc)
        mask = (a_cols < M)[:, None] & (b_cols < N)[None, :]
        place = expert.to(tl.int64) * M * N + a_cols.to(tl.int64)[:, None] * N + b_cols[None, :]
        tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=mask)
