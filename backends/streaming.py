"""`router_topk` in terms of the other operations: for a home that has no fused one."""

from __future__ import annotations

import numpy as np

from .protocol import Array, Ops

TILE = 256
"""Experts whose scores exist at a time."""
ROWS = 4096
"""(row, head) pairs worked on at a time."""


def router_topk(
    ops: Ops, x_NHD: Array, w_HDE: Array, bias_HE: Array | None, k: int, ids_NHK: Array | None = None
) -> tuple[Array, Array]:
    """`Ops.router_topk`. Saved for backward: x, w and the ids; the logits are taken again there."""
    rows, heads, width = x_NHD.shape
    num = w_HDE.shape[2]
    wide = "float64" if "float64" in (ops.dtype_of(x_NHD), ops.dtype_of(w_HDE)) else "float32"
    sizes = _sizes(rows, max(1, ROWS // heads))
    parts = ops.split(x_NHD, sizes)
    if ids_NHK is None:
        w = ops.cast(ops.stop_gradient(w_HDE), wide)
        ids_NHK = ops.concat([_best(ops, ops.cast(ops.stop_gradient(x), wide), w, bias_HE, k) for x in parts])
    first_H1 = ops.asarray((np.arange(heads) * num).reshape(1, heads, 1))
    w_rows = ops.cast(ops.transpose(w_HDE, (0, 2, 1)).reshape((heads * num, width)), wide)

    def logits(x_NHD: Array, w_rows: Array, index_NHK: Array) -> Array:
        columns = ops.take_rows(w_rows, index_NHK.reshape((-1,))).reshape((*index_NHK.shape, width))
        return (columns * ops.cast(x_NHD, wide).reshape((*x_NHD.shape[:2], 1, width))).sum(-1)

    index = ops.split(ids_NHK + first_H1, sizes)
    return ops.concat([ops.checkpoint(logits, x, w_rows, i) for x, i in zip(parts, index, strict=True)]), ids_NHK


def _sizes(total: int, size: int) -> list[int]:
    return [min(size, total - first) for first in range(0, max(1, total), size)]


def _best(ops: Ops, x_NHD: Array, w_HDE: Array, bias_HE: Array | None, k: int) -> Array:
    """Ids (n, H, k): each tile's scores are merged with the best of the tiles before, which come first, so that
    equal scores keep the lower id."""
    rows, heads, num = x_NHD.shape[0], *w_HDE.shape[::2]
    x_HND = ops.transpose(x_NHD, (1, 0, 2))
    tiles = _sizes(num, TILE)
    biases = ops.split(bias_HE, tiles, 1) if bias_HE is not None else [None] * len(tiles)
    scores, ids, first = None, None, 0
    for w, bias, size in zip(ops.split(w_HDE, tiles, 2), biases, tiles, strict=True):
        found = x_HND @ w
        found = found if bias is None else found + bias.reshape((heads, 1, size))
        found = found.reshape((heads * rows, size))
        theirs = ops.asarray(np.broadcast_to(np.arange(first, first + size), (heads * rows, size)))
        scores = found if scores is None else ops.concat([scores, found], 1)
        ids = theirs if ids is None else ops.concat([ids, theirs], 1)
        keep = ops.topk(scores, min(k, scores.shape[1]))
        scores, ids, first = ops.take_along(scores, keep), ops.take_along(ids, keep), first + size
    assert ids is not None
    return ops.transpose(ids.reshape((heads, rows, k)), (1, 0, 2))
