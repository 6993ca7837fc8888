"""Attention on the host: MindSpore's batched products, NumPy between them.

MindSpore's host kernels for broadcasting, for sums over the last axis and for products of transposed views cost ten
times as much as the products themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mindspore import Tensor

from .autograd import primitive
from .framework import mint, ops

_product = ops.BatchMatMul()
_product_tb = ops.BatchMatMul(transpose_b=True)
_product_ta = ops.BatchMatMul(transpose_a=True)

HIDDEN = -1e30
"""Added to scores that a query may not see; finite, so that a row without any is not NaN."""


def attention(q_SLHA: Tensor, k_SLHA: Tensor, v_SLHA: Tensor, allowed: Tensor | None) -> Tensor:
    """Causal scaled-dot-product attention, (S, L, H, A); k and v may have fewer heads (grouped queries).

    allowed: None (causal), or boolean (S, L, L), already causal, True where a query (row) may look.
    """
    return _attention_op(q_SLHA, k_SLHA, v_SLHA, allowed)


def _by_head(x: Tensor, groups: int) -> Tensor:
    """(S, L, H, A) -> (S, G, H/G * L, A): queries that share a key head are stacked as rows."""
    sequences, length, heads, width = x.shape
    moved = np.ascontiguousarray(x.asnumpy().transpose(0, 2, 1, 3))
    return Tensor.from_numpy(moved.reshape(sequences, groups, heads // groups * length, width))


def _by_position(x: Tensor, length: int) -> Tensor:
    """(S, G, H/G * L, A) -> (S, L, H, A)."""
    sequences, _, _, width = x.shape
    by_head = x.asnumpy().reshape(sequences, -1, length, width)
    return Tensor.from_numpy(np.ascontiguousarray(by_head.transpose(0, 2, 1, 3)))


def _attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    if q.size == 0:
        return ops.zeros_like(q), (q, k, v)
    sequences, length, heads, width = q.shape
    q_g, k_g, v_g = (_by_head(x, k.shape[2]) for x in (q, k, v))
    scores = _product_tb(q_g, k_g).asnumpy().reshape(sequences, heads, length, length)
    visible = np.tril(np.ones((1, length, length), bool)) if allowed is None else allowed.asnumpy()
    scores *= scores.dtype.type(width**-0.5)
    scores += np.where(visible, 0, HIDDEN).astype(scores.dtype)[:, None]
    p = mint.softmax(Tensor.from_numpy(scores.reshape(*q_g.shape[:3], length)), -1)
    return _by_position(_product(p, v_g), length), (q_g, k_g, v_g, p)


def _attention_backward(gradient: Tensor, saved: Sequence[Tensor], _inputs: Any, _needs: Any) -> tuple[Any, ...]:
    if gradient.size == 0:
        return tuple(ops.zeros_like(x) for x in saved)
    q, k, v, p = saved
    length = gradient.shape[1]
    g = _by_head(gradient, k.shape[1])
    ds, weights = _product_tb(g, v).asnumpy(), p.asnumpy()
    ds -= np.einsum("...k,...k->...", ds, weights)[..., None]
    ds *= weights
    ds *= ds.dtype.type(q.shape[-1] ** -0.5)
    scores = Tensor.from_numpy(ds)
    found = (_product(scores, k), _product_ta(scores, q), _product_ta(p, g))
    return tuple(_by_position(x, length) for x in found)


_attention_op = primitive(_attention, _attention_backward)
