"""Grouped GEMMs over row tiles: gather + up + activation, and the plain one (down; expanded dx)."""

from __future__ import annotations

import triton
import triton.language as tl

from .ragged import store_part, store_rows
from .tiles import gelu, piece, row_tile, silu_parts, swizzle


@triton.jit
def up_kernel(
    x_ptr, x_desc, copies_ptr, w_desc, h_desc, act_desc, tiles_ptr, num_tiles_ptr, D, F,
    TOP_K: tl.constexpr, GATED: tl.constexpr, SAVE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, GRID: tl.constexpr,
    FLATTEN: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """act = f(x[token] @ w_up[e]) for each expert's rows; h, the pre-activation, is stored if SAVE.

    x (T, D); copies (N,), the flat (token, k) of each sorted row: token = copy // TOP_K. TOP_K = 0: x_desc holds
    the rows in sorted order. w_desc over (E * D, 2F or F), box (BK, BN);
    h_desc, ragged over (N, 2 or 1, F), act_desc, ragged over (N, F): both with boxes of BN / PIECES columns.
    """
    rows = tl.load(num_tiles_ptr)
    columns = tl.cdiv(F, BN)
    k_tiles = tl.cdiv(D, BK)
    width: tl.constexpr = BN // PIECES
    for tile in tl.range(tl.program_id(0), rows * columns, GRID, flatten=FLATTEN):
        m, n = swizzle(tile, rows, columns, GROUP)
        expert, first, end = row_tile(tiles_ptr, m)
        if TOP_K:
            offs = tl.minimum(first + tl.arange(0, BM), end - 1)
            token = (tl.load(copies_ptr + offs) // TOP_K).to(tl.int64)
            a_ptrs = x_ptr + token[:, None] * D + tl.arange(0, BK)[None, :]
        gate = tl.zeros((BM, BN), tl.float32)
        if GATED:
            up = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(0, k_tiles):
            a = tl.load(a_ptrs + k * BK) if TOP_K else x_desc.load([first, k * BK])
            gate = tl.dot(a, w_desc.load([expert * D + k * BK, n * BN]), gate)
            if GATED:
                up = tl.dot(a, w_desc.load([expert * D + k * BK, F + n * BN]), up)
        for p in tl.static_range(PIECES):
            col = n * BN + p * width
            gate_p = piece(gate, p, PIECES)
            if GATED:
                up_p = piece(up, p, PIECES)
                _, silu = silu_parts(gate_p)
                act = silu * up_p
            else:
                act = gelu(gate_p)
            store_rows(act_desc, end, end - first, col, act)
            if SAVE:
                store_part(h_desc, end, end - first, 0, col, gate_p)
                if GATED:
                    store_part(h_desc, end, end - first, 1, col, up_p)


@triton.jit
def rows_kernel(
    a_desc, w_desc, out_desc, tiles_ptr, num_tiles_ptr, K, N,
    TRANSPOSED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    GRID: tl.constexpr, FLATTEN: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """out = a @ w[e] (or w[e]^T if TRANSPOSED) for each expert's rows.

    a (rows, K); w_desc over (E * K, N), box (BK, BN), or, TRANSPOSED, over (E * N, K), box (BN, BK);
    out_desc, ragged over (rows, N), box (BM, BN / PIECES).
    """
    rows = tl.load(num_tiles_ptr)
    columns = tl.cdiv(N, BN)
    k_tiles = tl.cdiv(K, BK)
    for tile in tl.range(tl.program_id(0), rows * columns, GRID, flatten=FLATTEN):
        m, n = swizzle(tile, rows, columns, GROUP)
        expert, first, end = row_tile(tiles_ptr, m)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(0, k_tiles):
            a = a_desc.load([first, k * BK])
            if TRANSPOSED:
                w = w_desc.load([expert * N + n * BN, k * BK]).T
            else:
                w = w_desc.load([expert * K + k * BK, n * BN])
            acc = tl.dot(a, w, acc)
        for p in tl.static_range(PIECES):
            store_rows(out_desc, end, end - first, n * BN + p * (BN // PIECES), piece(acc, p, PIECES))
