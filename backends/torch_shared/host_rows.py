"""Rows by index on the host: gathers without masks where no index is missing, weighted sums in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops as shared

BLOCK = 1 << 18
"""Elements worked on at a time, so that a second pass over them finds them in the cache."""

_WIDE = (torch.float32, torch.float64)
"""Dtypes whose sums need no wider one; others take the plain operations."""


def row_blocks(x_ND: Tensor) -> list[slice]:
    """Runs of rows of about BLOCK elements."""
    rows = max(1, BLOCK // max(1, x_ND.shape[-1]))
    return [slice(first, first + rows) for first in range(0, x_ND.shape[0], rows)]


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index_N: Tensor) -> Tensor:
        ctx.save_for_backward(index_N)
        ctx.num_rows = x.shape[0]
        return _gather(x, index_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _add_up(grads[0], ctx.saved_tensors[0], ctx.num_rows), None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index_N: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(index_N)
        return _add_up(rows, index_N, num_rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grads[0], ctx.saved_tensors[0]), None, None


def take_rows(x: Tensor, index_N: Tensor) -> Tensor:
    return _TakeRows.apply(x, index_N)  # type: ignore[no-any-return]


def sum_rows(rows_ND: Tensor, index_N: Tensor, num_rows: int) -> Tensor:
    return _SumRows.apply(rows_ND, index_N, num_rows)  # type: ignore[no-any-return]


def _add_up(rows: Tensor, index_N: Tensor, num_rows: int) -> Tensor:
    if rows.dtype not in _WIDE or _missing(index_N) is not None:
        return shared.sum_rows(rows, index_N, num_rows)
    return rows.new_zeros((num_rows, *rows.shape[1:])).index_add_(0, index_N, rows)


def _gather(x: Tensor, index_N: Tensor) -> Tensor:
    if x.shape[0] == 0:
        return x.new_zeros((index_N.shape[0], *x.shape[1:]))
    missing = _missing(index_N)
    if missing is None:
        return x.index_select(0, index_N)
    return x.index_select(0, index_N.clamp(min=0)).index_fill_(0, missing, 0)


def _missing(index_N: Tensor) -> Tensor | None:
    """Where an index is -1; None if nowhere."""
    if index_N.numel() == 0 or int(index_N.min()) >= 0:
        return None
    return (index_N < 0).nonzero()[:, 0]


class _CombineRows(torch.autograd.Function):
    """y = sum_k w * rows[index] as a bag of weighted rows per token; saves rows, index and weights."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows, index_TK, weights_TK)
        if index_TK.numel() == 0 or rows.numel() == 0:
            return rows.new_zeros((index_TK.shape[0], *rows.shape[1:]))
        index, weights = index_TK.reshape(-1), weights_TK.reshape(-1).to(rows.dtype)
        if int(index.min()) >= 0:
            starts = torch.arange(0, index.shape[0], index_TK.shape[1])
        else:
            kept = index_TK >= 0
            number = kept.sum(1)
            starts, kept = number.cumsum(0) - number, kept.reshape(-1)
            index, weights = index[kept], weights[kept]
        return torch.embedding_bag(rows.contiguous(), index, starts, False, 0, False, weights, False)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor]:
        rows, index_TK, weights_TK = ctx.saved_tensors
        token_N, weight_N = _by_row(index_TK, weights_TK.to(rows.dtype), rows.shape[0])
        missing = _missing(token_N)
        token_N = token_N if missing is None else token_N.clamp(min=0)
        d_rows, d_weight_N = torch.empty_like(rows), torch.empty_like(weight_N)
        if grads[0].shape[0] == 0:
            return d_rows.zero_(), None, torch.zeros_like(weights_TK)
        for block in row_blocks(rows):
            d_y = torch.index_select(grads[0], 0, token_N[block], out=d_rows[block])
            torch.sum(d_y * rows[block], -1, out=d_weight_N[block])
            d_y.mul_(weight_N[block, None])
        if missing is not None:
            d_rows.index_fill_(0, missing, 0)
        return d_rows, None, _gather(d_weight_N, index_TK.reshape(-1)).reshape(index_TK.shape).to(weights_TK.dtype)


def _by_row(index_TK: Tensor, weights_TK: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """(token, weight) of each row; -1 and 0 where no token refers to it."""
    index = index_TK.reshape(-1)
    token = torch.arange(index.shape[0]).div_(max(1, index_TK.shape[1]), rounding_mode="floor")
    weights = weights_TK.reshape(-1)
    if index.numel() and int(index.min()) < 0:
        kept = index >= 0
        index, token, weights = index[kept], token[kept], weights[kept]
    token_N = torch.full((num_rows,), -1, dtype=torch.int64).scatter_(0, index, token)
    return token_N, weights.new_zeros(num_rows).scatter_(0, index, weights)


def combine_rows(rows_ND: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    if rows_ND.dtype not in _WIDE:
        return shared.combine_rows(rows_ND, index_TK, weights_TK)
    return _CombineRows.apply(rows_ND, index_TK, weights_TK)  # type: ignore[no-any-return]
