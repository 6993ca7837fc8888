"""Experts of narrow tokens (Multi-Head LatentMoE): a whole expert in one kernel, its activation never leaves the chip.

Nothing but x is kept for backward: the pre-activation is a product of depth D, cheaper to make again than to read.
D, a power of two, is one tile; F is walked in tiles of BF.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ragged import store_rows
from .tiles import gelu, gelu_slope, row_tile, silu_parts


@triton.jit
def _gathered(base_ptr, token, D: tl.constexpr):
    return tl.load(base_ptr + token[:, None] * D + tl.arange(0, D)[None, :])


@triton.jit
def _activate(gate, up, GATED: tl.constexpr):
    """(act, its derivative by up or 1, by gate)."""
    if GATED:
        s, silu = silu_parts(gate)
        return silu * up, silu, up * (s + silu * (1.0 - s))
    else:
        return gelu(gate), gate, gelu_slope(gate)


@triton.jit
def small_forward_kernel(
    x_ptr, copies_ptr, up_desc, down_desc, out_desc, tiles_ptr, num_tiles_ptr, F,
    TOP_K: tl.constexpr, GATED: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, BF: tl.constexpr, GRID: tl.constexpr,
):  # fmt: skip
    """out[row] = f(x[token] @ w_up[e]) @ w_down[e] for each expert's rows; token = copies[row] // TOP_K.

    x (T, D); up_desc over (E * D, 2F or F), box (D, BF); down_desc over (E * F, D), box (BF, D); out_desc, ragged over
    (N, D), box (BM, D).
    """
    dtype: tl.constexpr = up_desc.dtype
    for tile in tl.range(tl.program_id(0), tl.load(num_tiles_ptr), GRID):
        expert, first, end = row_tile(tiles_ptr, tile)
        offs = tl.minimum(first + tl.arange(0, BM), end - 1)
        x = _gathered(x_ptr, (tl.load(copies_ptr + offs) // TOP_K).to(tl.int64), D)
        y = tl.zeros((BM, D), tl.float32)
        for f in tl.range(0, F, BF):
            gate = tl.dot(x, up_desc.load([expert * D, f]))
            up = tl.dot(x, up_desc.load([expert * D, F + f])) if GATED else gate
            act, _, _ = _activate(gate, up, GATED)
            y = tl.dot(act.to(dtype), down_desc.load([expert * F + f, 0]), y)
        store_rows(out_desc, end, end - first, 0, y)


@triton.jit
def small_token_grad_kernel(
    x_ptr, g_ptr, copies_ptr, weight_ptr, up_desc, down_desc, dx_desc, dweight_ptr, tiles_ptr, num_tiles_ptr, F,
    TOP_K: tl.constexpr, GATED: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, BF: tl.constexpr, GRID: tl.constexpr,
):  # fmt: skip
    """Per row: gradient of x (before the sum over copies), and of the routing weight, dweight (N,) by copy.

    g (T, D): gradient of the layer's output; weight (N,) by copy; descriptors as in `small_forward_kernel`.
    """
    dtype: tl.constexpr = up_desc.dtype
    for tile in tl.range(tl.program_id(0), tl.load(num_tiles_ptr), GRID):
        expert, first, end = row_tile(tiles_ptr, tile)
        offs = first + tl.arange(0, BM)
        copies = tl.load(copies_ptr + tl.minimum(offs, end - 1))
        token = (copies // TOP_K).to(tl.int64)
        x, g = _gathered(x_ptr, token, D), _gathered(g_ptr, token, D)
        weight = tl.load(weight_ptr + copies).to(tl.float32)[:, None]
        dx = tl.zeros((BM, D), tl.float32)
        dweight = tl.zeros((BM,), tl.float32)
        for f in tl.range(0, F, BF):
            w_gate = up_desc.load([expert * D, f])
            gate = tl.dot(x, w_gate)
            if GATED:
                w_up = up_desc.load([expert * D, F + f])
                up = tl.dot(x, w_up)
            else:
                up = gate
            d = tl.dot(g, down_desc.load([expert * F + f, 0]).T)
            act, by_up, by_gate = _activate(gate, up, GATED)
            dweight += tl.sum(act * d, axis=1)
            d = d * weight
            dx = tl.dot((d * by_gate).to(dtype), w_gate.T, dx)
            if GATED:
                dx = tl.dot((d * by_up).to(dtype), w_up.T, dx)
        store_rows(dx_desc, end, end - first, 0, dx)
        tl.store(dweight_ptr + copies, dweight, mask=offs < end)


@triton.jit
def small_weight_grad_kernel(
    x_ptr, g_ptr, copies_ptr, weight_ptr, up_desc, down_desc, d_up_desc, d_down_desc, order_ptr, offsets_ptr, F,
    TOP_K: tl.constexpr, GATED: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Gradients of BF hidden units of one expert, over its rows in order; longest experts start first.

    d_up_desc and d_down_desc: like up_desc and down_desc, over the gradients. An empty expert gets exact zeros.
    """
    dtype: tl.constexpr = up_desc.dtype
    expert = tl.load(order_ptr + tl.program_id(0) // (F // BF))
    f = tl.program_id(0) % (F // BF) * BF
    first = tl.load(offsets_ptr + expert)
    count = tl.load(offsets_ptr + expert + 1) - first
    w_gate = up_desc.load([expert * D, f])
    if GATED:
        w_up = up_desc.load([expert * D, F + f])
        d_w_up = tl.zeros((D, BF), tl.float32)
    w_down = down_desc.load([expert * F + f, 0]).T
    d_w_gate = tl.zeros((D, BF), tl.float32)
    d_w_down = tl.zeros((BF, D), tl.float32)
    for k in tl.range(0, count, BK):
        offs = k + tl.arange(0, BK)
        inside = offs < count
        copies = tl.load(copies_ptr + first + offs, mask=inside, other=0)
        weight = tl.load(weight_ptr + copies, mask=inside, other=0.0).to(tl.float32)[:, None]  # 0: no part in any sum
        token = (copies // TOP_K).to(tl.int64)
        x, g = _gathered(x_ptr, token, D), _gathered(g_ptr, token, D)
        gate = tl.dot(x, w_gate)
        up = tl.dot(x, w_up) if GATED else gate
        d = tl.dot(g, w_down) * weight
        act, by_up, by_gate = _activate(gate, up, GATED)
        d_w_gate = tl.dot(x.T, (d * by_gate).to(dtype), d_w_gate)
        if GATED:
            d_w_up = tl.dot(x.T, (d * by_up).to(dtype), d_w_up)
        d_w_down = tl.dot((act * weight).to(dtype).T, g, d_w_down)
    d_up_desc.store([expert * D, f], d_w_gate.to(dtype))
    if GATED:
        d_up_desc.store([expert * D, F + f], d_w_up.to(dtype))
    d_down_desc.store([expert * F + f, 0], d_w_down.to(dtype))
