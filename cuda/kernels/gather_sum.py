"""Weighted sum of k rows a token: the combine of a forward pass, the token gradient of a backward pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def gather_sum_kernel(
    rows_ptr, position_ptr, weight_ptr, out_ptr, D,
    TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over k, in order, of weight[t, k] * rows[position[t, k]]; position -1 adds nothing."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < D
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        position = tl.load(position_ptr + token * TOP_K + k).to(tl.int64)
        row = tl.load(rows_ptr + position * D + cols, mask=inside & (position >= 0), other=0.0).to(tl.float32)
        if WEIGHTED:
            row = row * tl.load(weight_ptr + token * TOP_K + k).to(tl.float32)
        total += row
    tl.store(out_ptr + token * D + cols, total.to(out_ptr.dtype.element_ty), mask=inside)


def gather_sum(
    rows_ND: torch.Tensor,
    position_TK: torch.Tensor,
    weights_TK: torch.Tensor | None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """y (T, D) = sum over k of weights[t, k] * rows[position[t, k]], summed in float32; -1 adds exact zeros.

    dtype: of y; None: that of rows.
    """
    tokens, top_k = position_TK.shape
    width = rows_ND.shape[1]
    out = torch.empty((tokens, width), dtype=dtype or rows_ND.dtype, device=rows_ND.device)
    if not out.numel():
        return out
    block = min(triton.next_power_of_2(width), 2048)
    weights = rows_ND if weights_TK is None else weights_TK
    grid = (tokens, triton.cdiv(width, block))
    gather_sum_kernel[grid](
        rows_ND, position_TK, weights, out, width, TOP_K=top_k, WEIGHTED=weights_TK is not None, BLOCK=block,
        num_warps=max(1, block // 512),
    )  # fmt: skip
    return out
