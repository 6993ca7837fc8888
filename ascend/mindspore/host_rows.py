"""Row movement and integer work of the host: NumPy on the tensors' own memory.

MindSpore's host operators have no stable sort, fail on empty indices and sum repeated rows in no promised order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mindspore import Tensor
from scipy import sparse

from .autograd import primitive


def topk(scores_TE: Tensor, k: int) -> Tensor:
    """Ids (T, k) int64 of the k largest, best first; ties go to the lower id. No gradient.

    NaN counts as minus infinity, and ids of a row are always distinct and in range.
    """
    return Tensor.from_numpy(best_ids(scores_TE.asnumpy(), k))


def argsort(keys_N: Tensor) -> Tensor:
    """Stable ascending order of non-negative integers (N,). No gradient."""
    return Tensor.from_numpy(np.argsort(keys_N.asnumpy(), kind="stable"))


def invert(order_N: Tensor) -> Tensor:
    """Inverse of a permutation: invert(order)[order[n]] = n. No gradient."""
    order = order_N.asnumpy()
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return Tensor.from_numpy(inverse)


def count(ids: Tensor, num: int) -> Tensor:
    """How often each of 0..num-1 occurs, int64 (num,); ids outside that range do not count. No gradient."""
    flat = ids.asnumpy().reshape(-1)
    return Tensor.from_numpy(np.bincount(flat[(flat >= 0) & (flat < num)], minlength=num))


def take_rows(x: Tensor, index_N: Tensor) -> Tensor:
    """Rows x[index] (N, ...); index -1 gives a zero row. The gradient is `sum_rows`. x may be 1-D, or integers."""
    return _take_op(x, index_N)


def sum_rows(rows_ND: Tensor, index_N: Tensor, num_rows: int) -> Tensor:
    """Add row n into row index[n] of a zero (num_rows, D); -1 is ignored. Deterministic.

    Sums in at least float32 and in ascending order of n.
    """
    return _sum_op(rows_ND, index_N, num_rows)


def combine_rows(rows_ND: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """y[t] = sum over k, in order, of weights[t, k] * rows[index[t, k]]; index -1 contributes exact zeros.

    Sums in at least float32, result in the dtype of rows. Each row is referenced at most once, so the
    gradient to rows is a gather.
    """
    return _combine_op(rows_ND, index_TK, weights_TK)


# --- NumPy kernels ---------------------------------------------------------------------------
def best_ids(scores: np.ndarray, k: int) -> np.ndarray:
    """Column numbers (rows, k) of the k largest: argmax names the first of equals; rows that run out are sorted."""
    left = np.where(np.isnan(scores), -np.inf, scores)
    order = np.empty((len(left), k), np.int64)
    rows = np.arange(len(left))
    out_of_finite = np.zeros(len(left), bool)
    for place in range(k):
        order[:, place] = left.argmax(1) if len(left) else 0
        out_of_finite |= left[rows, order[:, place]] == -np.inf
        left[rows, order[:, place]] = -np.inf
    if out_of_finite.any():
        again = np.where(np.isnan(scores[out_of_finite]), -np.inf, scores[out_of_finite])
        order[out_of_finite] = np.argsort(-again, axis=1, kind="stable")[:, :k]
    return order


def gather(x: np.ndarray, index: np.ndarray) -> np.ndarray:
    """x[index], zeros where index < 0."""
    if not len(x):
        return np.zeros((*index.shape, *x.shape[1:]), x.dtype)
    rows = x[index]
    absent = index < 0
    if absent.any():
        rows[absent] = 0
    return rows


def scatter_sum(rows: np.ndarray, index: np.ndarray, num_rows: int) -> np.ndarray:
    """Rows added in ascending order into (num_rows, ...): a sparse product walks each row's entries in order."""
    wide = np.result_type(rows.dtype, np.float32)
    kept = index >= 0
    order = np.argsort(np.where(kept, index, num_rows), kind="stable")[: int(kept.sum())]
    starts = np.zeros(num_rows + 1, np.int64)
    np.cumsum(np.bincount(index[kept], minlength=num_rows), out=starts[1:])
    matrix = sparse.csr_matrix((np.ones(len(order), wide), order, starts), shape=(num_rows, len(rows)))
    flat = rows.reshape(len(rows), int(np.prod(rows.shape[1:]))).astype(wide, copy=False)
    return np.asarray(matrix @ flat).reshape(num_rows, *rows.shape[1:]).astype(rows.dtype, copy=False)


def _take(x: Tensor, index: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    return Tensor.from_numpy(gather(x.asnumpy(), index.asnumpy())), (index, x)


def _take_backward(gradient: Tensor, saved: Sequence[Tensor], _inputs: Any, _needs: Any) -> tuple[Any, ...]:
    index, x = saved
    return (Tensor.from_numpy(scatter_sum(gradient.asnumpy(), index.asnumpy(), x.shape[0])),)


def _sum(rows: Tensor, index: Tensor, num_rows: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    return Tensor.from_numpy(scatter_sum(rows.asnumpy(), index.asnumpy(), num_rows)), (index,)


def _sum_backward(gradient: Tensor, saved: Sequence[Tensor], _inputs: Any, _needs: Any) -> tuple[Any, ...]:
    return (Tensor.from_numpy(gather(gradient.asnumpy(), saved[0].asnumpy())),)


def _combine(rows: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    values, at, w = rows.asnumpy(), index.asnumpy(), weights.asnumpy()
    wide = np.result_type(values.dtype, w.dtype, np.float32)
    total = np.zeros((len(at), values.shape[1]), wide)
    for k in range(at.shape[1]):
        total += gather(values, at[:, k]) * np.where(at[:, k] < 0, 0, w[:, k]).astype(wide, copy=False)[:, None]
    return Tensor.from_numpy(total.astype(values.dtype, copy=False)), (rows, index, weights)


def _combine_backward(gradient: Tensor, saved: Sequence[Tensor], _inputs: Any, needs: Any) -> tuple[Any, ...]:
    rows, index, weights = saved
    values, at, w, g = rows.asnumpy(), index.asnumpy(), weights.asnumpy(), gradient.asnumpy()
    wide = np.result_type(values.dtype, w.dtype, np.float32)
    drows = np.zeros(values.shape, values.dtype)
    dweights = np.zeros(w.shape, w.dtype)
    for k in range(at.shape[1]):
        kept = np.flatnonzero(at[:, k] >= 0)
        here, g_k = at[kept, k], g[kept].astype(wide, copy=False)
        if needs[0]:
            drows[here] = g_k * w[kept, k].astype(wide, copy=False)[:, None]
        dweights[kept, k] = np.einsum("td,td->t", g_k, values[here].astype(wide, copy=False))
    return Tensor.from_numpy(drows), None, Tensor.from_numpy(dweights)


_take_op = primitive(_take, _take_backward)
_sum_op = primitive(_sum, _sum_backward)
_combine_op = primitive(_combine, _combine_backward)
