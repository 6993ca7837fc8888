"""Grouped products and weighted sums from kernels that know neither padding, empty ranks nor (grouped) gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backends.torch_shared.ops import _CombineRows as PlainCombineRows
from . import kernels


class _GroupedMatmul(torch.autograd.Function):
    """dx = g w^T and dw = x^T g by row blocks; a block without rows gets zeros, whatever the kernel left there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, counts_G: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, counts_G)
        if x.shape[0] == 0:
            return x.new_zeros((0, w.shape[2]))
        ends, padding = _blocks(counts_G, x.shape[0])
        return kernels.grouped_rows(x, w, ends).masked_fill(padding, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w, counts_G = ctx.saved_tensors
        if x.shape[0] == 0:
            return torch.zeros_like(x), torch.zeros_like(w), None
        ends, padding = _blocks(counts_G, x.shape[0])
        g = grads[0].masked_fill(padding, 0)
        dx, dw = None, None
        if ctx.needs_input_grad[0]:
            dx = kernels.grouped_rows(g, w.transpose(1, 2), ends).masked_fill(padding, 0)
        if ctx.needs_input_grad[1]:
            dw = kernels.grouped_weights(x.masked_fill(padding, 0), g, ends)
            dw = dw.masked_fill((counts_G == 0)[:, None, None], 0)
        return dx, dw, None


def _blocks(counts_G: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """(G,) ends of the row blocks, the last one stretched over padding rows; (N, 1) True where a row is padding.

    The kernel wants the last end to be the number of rows, which the host does not know without a wait.
    """
    ends = counts_G.cumsum(0)
    padding = torch.arange(rows, device=counts_G.device) >= ends[-1:]
    stretched = torch.cat([ends[:-1], torch.full_like(ends[-1:], rows)])
    return stretched, padding[:, None]


def grouped_matmul(x_ND: Tensor, w_GDF: Tensor, counts_G: Tensor) -> Tensor:
    """Row blocks of x, counts[g] rows each, times w[g]; rows after the last block give exact zeros.

    Groups of zero rows are legal and get exactly zero weight gradient.
    """
    return _GroupedMatmul.apply(x_ND, w_GDF, counts_G)  # type: ignore[no-any-return]


def expert_mlp(x_ND: Tensor, w_up: Tensor, w_down: Tensor, counts_G: Tensor, activation: str) -> Tensor:
    """Grouped feed-forward: act(x @ w_up[g]) @ w_down[g].

    swiglu: w_up is (G, D, 2F), gate columns first, act = silu(gate) * up. gelu: w_up is (G, D, F), exact gelu.
    """
    h = grouped_matmul(x_ND, w_up, counts_G)
    return grouped_matmul(_activate(h, activation), w_down, counts_G)


def _activate(h: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return F.gelu(h)
    return kernels.swiglu(h) if h.shape[0] else h[:, : h.shape[1] // 2]


class _CombineRows(PlainCombineRows):
    """The plain gradient, which writes rows by index: the kernel's leaves rows that nobody names unset."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows, index_TK, weights_TK)
        if rows.shape[0] == 0 or index_TK.shape[0] == 0:
            return rows.new_zeros((index_TK.shape[0], rows.shape[1]))
        wide = torch.promote_types(rows.dtype, torch.float32)
        dropped = index_TK < 0
        slots = torch.where(dropped, rows.shape[0], index_TK).reshape(-1).to(torch.int32)
        weights = weights_TK.to(wide).masked_fill(dropped, 0)
        return kernels.unpermute(F.pad(rows.to(wide), (0, 0, 0, 1)), slots, weights).to(rows.dtype)


def combine_rows(rows_ND: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """y[t] = sum over k, in order, of weights[t, k] * rows[index[t, k]]; index -1 contributes exact zeros.

    Sums in at least float32, result in the dtype of rows. Dropped copies read a zero row behind the others: a zero
    weight alone would let NaN through.
    """
    return _CombineRows.apply(rows_ND, index_TK, weights_TK)  # type: ignore[no-any-return]
