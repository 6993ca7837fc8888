"""Row movement and integer work in MindSpore operators that exist on NPUs and, for the tests, on the host too.

An index of -1 is sent to a row past the end: written there and cut off, or masked after reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mindspore as ms
from mindspore import Tensor

from .autograd import primitive
from .framework import mint, ops
from .ops import widen


def topk(scores_TE: Tensor, k: int) -> Tensor:
    """Ids (T, k) int64 of the k largest, best first; ties go to the lower id. No gradient.

    NaN counts as minus infinity, and ids of a row are always distinct and in range. One round per choice: no
    device kernel promises an order among equals.
    """
    rows, experts = scores_TE.shape
    if rows == 0:
        return mint.zeros((0, k), dtype=ms.int64)
    scores = widen(ops.stop_gradient(scores_TE))
    scores = mint.where(scores == scores, scores, float("-inf"))
    columns = ops.arange(experts).astype(ms.float32).reshape((1, experts))
    free = columns >= 0
    picks = []
    for _ in range(k):
        left = mint.where(free, scores, float("-inf"))
        best = mint.logical_and(left == mint.amax(left, -1, True), free)
        pick = mint.amin(mint.where(best, columns, float(experts)), -1, True)
        free = mint.logical_and(free, columns != pick)
        picks.append(pick)
    return mint.cat(picks, -1).astype(ms.int64)


def argsort(keys_N: Tensor) -> Tensor:
    """Stable ascending order of non-negative integers (N,). No gradient."""
    return mint.argsort(keys_N, stable=True) if keys_N.size else keys_N


def invert(order_N: Tensor) -> Tensor:
    """Inverse of a permutation: invert(order)[order[n]] = n. No gradient."""
    if order_N.size == 0:
        return order_N
    places = ops.arange(order_N.shape[0]).astype(order_N.dtype)
    return mint.scatter(mint.zeros(order_N.shape, dtype=order_N.dtype), 0, order_N, places)


def count(ids: Tensor, num: int) -> Tensor:
    """How often each of 0..num-1 occurs, int64 (num,); ids outside that range do not count. No gradient."""
    flat = ids.reshape((-1,))
    slots = mint.where(mint.logical_and(flat >= 0, flat < num), flat, num)
    ones = mint.ones(flat.shape, dtype=ms.int32)
    return mint.narrow(add_rows(ones, slots, num + 1), 0, 0, num).astype(ms.int64)


def take_rows(x: Tensor, index_N: Tensor) -> Tensor:
    """Rows x[index] (N, ...); index -1 gives a zero row. The gradient is `sum_rows`. x may be 1-D, or integers."""
    return _take_op(x, index_N)


def sum_rows(rows_ND: Tensor, index_N: Tensor, num_rows: int) -> Tensor:
    """Add row n into row index[n] of a zero (num_rows, D); -1 is ignored. Sums in at least float32.

    Deterministic where MindSpore's deterministic kernels are switched on, as the backend does.
    """
    return _sum_op(rows_ND, index_N, num_rows)


def combine_rows(rows_ND: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """y[t] = sum over k, in order, of weights[t, k] * rows[index[t, k]]; index -1 contributes exact zeros.

    Sums in at least float32, result in the dtype of rows. Each row is referenced at most once, so the
    gradient to rows is a gather.
    """
    return _combine_op(rows_ND, index_TK, weights_TK)


# --- without gradients -----------------------------------------------------------------------
def gather(x: Tensor, index: Tensor) -> Tensor:
    """x[index], zeros where index < 0."""
    shape = (*index.shape, *x.shape[1:])
    if 0 in shape or x.shape[0] == 0:
        return mint.zeros(shape, dtype=x.dtype)
    rows = ops.gather(x, mint.clamp(index, min=0), 0)
    present = (index >= 0).reshape((*index.shape, *[1] * (len(x.shape) - 1)))
    return mint.where(present, rows, ops.zeros_like(rows))


def add_rows(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Rows added into (num_rows, ...) by a non-negative index."""
    total = mint.zeros((num_rows, *rows.shape[1:]), dtype=rows.dtype)
    return mint.index_add(total, 0, index.astype(ms.int32), rows) if rows.size else total


def scatter_sum(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Rows added into (num_rows, ...); those with a negative index fall past the end."""
    slots = mint.where(index >= 0, index, num_rows)
    return mint.narrow(add_rows(widen(rows), slots, num_rows + 1), 0, 0, num_rows).astype(rows.dtype)


def _take(x: Tensor, index: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    return gather(x, index), (x, index)


def _take_backward(gradient: Tensor, saved: Sequence[Tensor], _inputs: Any, _needs: Any) -> tuple[Any, ...]:
    x, index = saved
    return (scatter_sum(gradient, index, x.shape[0]),)


def _sum(rows: Tensor, index: Tensor, num_rows: int) -> tuple[Tensor, Sequence[Tensor]]:
    return scatter_sum(rows, index, num_rows), (index,)


def _sum_backward(gradient: Tensor, saved: Sequence[Tensor], _inputs: Any, _needs: Any) -> tuple[Any, ...]:
    return (gather(gradient, saved[0]),)


def _combine(rows: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    tokens, choices = index.shape
    total = mint.zeros((tokens, rows.shape[1]), dtype=widen(rows).dtype)
    for k in range(choices) if tokens else ():
        row, weight = _column(rows, index, weights, k)
        total = total + row * weight
    return total.astype(rows.dtype), (rows, index, weights)


def combine_backward(gradient: Tensor, saved: Sequence[Tensor], _inputs: Any, _needs: Any) -> tuple[Any, ...]:
    """Of rows (a gather: each is named at most once), none of the index, of weights."""
    rows, index, weights = saved
    tokens, choices = index.shape
    drows = mint.zeros(rows.shape, dtype=widen(rows).dtype)
    if tokens == 0 or rows.shape[0] == 0:
        return drows.astype(rows.dtype), None, ops.zeros_like(weights)
    g, dweights = widen(gradient), []
    for k in range(choices):
        row, weight = _column(rows, index, weights, k)
        dweights.append((g * row).sum(-1).reshape((tokens, 1)))
        drows = drows + scatter_sum(g * weight, _choice(index, k), rows.shape[0])
    return drows.astype(rows.dtype), None, mint.cat(dweights, -1).astype(weights.dtype)


def _choice(x_TK: Tensor, k: int) -> Tensor:
    """Column k of a table, (T,)."""
    return mint.narrow(x_TK, 1, k, 1).reshape((-1,))


def _column(rows: Tensor, index: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Rows that choice k names, and its weights (T, 1), in at least float32."""
    return widen(gather(rows, _choice(index, k))), widen(_choice(weights, k)).reshape((-1, 1))


_take_op = primitive(_take, _take_backward)
_sum_op = primitive(_sum, _sum_backward)
_combine_op = primitive(_combine, combine_backward)
