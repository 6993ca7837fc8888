"""Raw functions of the reference: NumPy arrays in, (value, vjp) out. The formulas of `backends/protocol.py`.

Index -1 and rows after the last group are skipped by selection, never by multiplying with zero, so that a NaN
in what is skipped reaches nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.special import erf, expit

from .tape import Vjp, unbroadcast

Result = tuple[np.ndarray, Vjp]


def exp(x: np.ndarray) -> Result:
    y = np.exp(x)
    return y, lambda g: (g * y,)


def log(x: np.ndarray) -> Result:
    return np.log(x), lambda g: (g / x,)


def sqrt(x: np.ndarray) -> Result:
    y = np.sqrt(x)
    return y, lambda g: (g / (2 * y),)


def sigmoid(x: np.ndarray) -> Result:
    y = expit(x)
    return y, lambda g: (g * y * (1 - y),)


def relu(x: np.ndarray) -> Result:
    return np.maximum(x, 0), lambda g: (np.where(x > 0, g, 0),)


def silu(x: np.ndarray) -> Result:
    s = expit(x)
    return x * s, lambda g: (g * s * (1 + x * (1 - s)),)


def gelu(x: np.ndarray) -> Result:
    phi = 0.5 * (1 + erf(x / np.sqrt(2)))
    density = np.exp(-0.5 * x * x) / np.sqrt(2 * np.pi)
    return x * phi, lambda g: (g * (phi + x * density),)


def where(condition: np.ndarray, a: np.ndarray, b: np.ndarray) -> Result:
    def vjp(g: np.ndarray) -> tuple[None, np.ndarray, np.ndarray]:
        return None, unbroadcast(np.where(condition, g, 0), a.shape), unbroadcast(np.where(condition, 0, g), b.shape)

    return np.where(condition, a, b), vjp


def softmax(x: np.ndarray) -> Result:
    e = np.exp(x - x.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    return p, lambda g: (p * (g - (g * p).sum(-1, keepdims=True)),)


def logsumexp(x: np.ndarray) -> Result:
    top = x.max(-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        y = top + np.log(np.exp(x - top).sum(-1, keepdims=True))
    finite = np.where(np.isneginf(y), 0, y)
    return y[..., 0], lambda g: (g[..., None] * np.exp(x - finite),)


def concat(*parts: np.ndarray, axis: int) -> Result:
    ends = np.cumsum([p.shape[axis] for p in parts])[:-1]
    return np.concatenate(parts, axis), lambda g: np.split(g, ends, axis)


def piece(x: np.ndarray, start: int, size: int, axis: int) -> Result:
    """x[start : start + size] along an axis."""
    where_ = [slice(None)] * x.ndim
    where_[axis] = slice(start, start + size)

    def vjp(g: np.ndarray) -> tuple[np.ndarray]:
        dx = np.zeros(x.shape)
        dx[tuple(where_)] = g
        return (dx,)

    return x[tuple(where_)], vjp


def transpose(x: np.ndarray, axes: Sequence[int]) -> Result:
    return np.ascontiguousarray(x.transpose(axes)), lambda g: (g.transpose(np.argsort(axes)),)


def take_along(x: np.ndarray, ids: np.ndarray) -> Result:
    rows = np.arange(x.shape[0])[:, None]

    def vjp(g: np.ndarray) -> tuple[np.ndarray, None]:
        dx = np.zeros(x.shape)
        np.add.at(dx, (rows, ids), g)
        return dx, None

    return x[rows, ids], vjp


def gather(x: np.ndarray, index: np.ndarray) -> np.ndarray:
    """x[index] where index >= 0, zero rows elsewhere."""
    out = np.zeros((*index.shape, *x.shape[1:]), x.dtype)
    out[index >= 0] = x[index[index >= 0]]
    return out


def scatter(rows: np.ndarray, index: np.ndarray, num_rows: int) -> np.ndarray:
    """Zeros (num_rows, ...) plus rows[n] at index[n], n ascending; -1 is ignored."""
    out = np.zeros((num_rows, *rows.shape[index.ndim :]), rows.dtype)
    np.add.at(out, index[index >= 0], rows[index >= 0])
    return out


def take_rows(x: np.ndarray, index: np.ndarray) -> Result:
    return gather(x, index), lambda g: (scatter(g, index, x.shape[0]), None)


def sum_rows(rows: np.ndarray, index: np.ndarray, num_rows: int) -> Result:
    return scatter(rows, index, num_rows), lambda g: (gather(g, index), None)


def combine_rows(rows: np.ndarray, index: np.ndarray, weights: np.ndarray) -> Result:
    weights = np.where(index >= 0, weights, 0)
    picked = gather(rows, index)
    y = np.zeros((index.shape[0], *rows.shape[1:]))
    for k in range(index.shape[1]):
        y = y + weights[:, k, None] * picked[:, k]

    def vjp(g: np.ndarray) -> tuple[np.ndarray, None, np.ndarray]:
        d_rows = scatter(weights[..., None] * g[:, None], index, rows.shape[0])
        return d_rows, None, (picked * g[:, None]).sum(-1) * (index >= 0)

    return y, vjp


def grouped_matmul(x: np.ndarray, w: np.ndarray, counts: np.ndarray) -> Result:
    if counts.shape != w.shape[:1] or counts.sum() > len(x) or counts.min(initial=0) < 0:
        raise ValueError(f"counts {counts.tolist()} do not fit {len(x)} rows and {len(w)} groups; pass one per group")
    y = np.zeros((x.shape[0], w.shape[2]))
    for g, rows in blocks(counts):
        y[rows] = x[rows] @ w[g]

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, np.ndarray, None]:
        dx, dw = np.zeros(x.shape), np.zeros(w.shape)
        for g, rows in blocks(counts):
            dx[rows] = dy[rows] @ w[g].T
            dw[g] = x[rows].T @ dy[rows]
        return dx, dw, None

    return y, vjp


def chosen_logits(x: np.ndarray, w: np.ndarray, ids: np.ndarray) -> Result:
    """x[n, h] . w[h, :, ids[n, h, k]], shape (N, H, K)."""
    heads = np.arange(w.shape[0])[:, None]
    columns = w.transpose(0, 2, 1)[heads, ids]  # (N, H, K, D)

    def vjp(g: np.ndarray) -> tuple[np.ndarray, np.ndarray, None]:
        dw = np.zeros((w.shape[0], w.shape[2], w.shape[1]))
        np.add.at(dw, (heads, ids), g[..., None] * x[:, :, None])
        return (g[..., None] * columns).sum(2), dw.transpose(0, 2, 1), None

    return (x[:, :, None] * columns).sum(-1), vjp


def blocks(counts: np.ndarray) -> Iterator[tuple[int, slice]]:
    """(group, its rows) in order."""
    start = 0
    for g, n in enumerate(counts.tolist()):
        yield g, slice(start, start + n)
        start += n


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> Result:
    inverse = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    normed = x * inverse

    def vjp(g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        d = g * weight
        dx = inverse * (d - normed * (d * normed).mean(-1, keepdims=True))
        return dx, unbroadcast(g * normed, weight.shape)

    return normed * weight, vjp


def rotary(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> Result:
    def turned(z: np.ndarray) -> np.ndarray:
        first, second = np.split(z, 2, -1)
        return np.concatenate([-second, first], -1)

    def vjp(g: np.ndarray) -> tuple[np.ndarray, None, None]:
        return g * cos - turned(g * sin), None, None

    return x * cos + turned(x) * sin, vjp


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, allowed: np.ndarray) -> Result:
    """allowed: boolean, broadcasts to (S, L, L)."""
    s, length, heads, width = q.shape
    groups = k.shape[2]
    q5 = q.reshape(s, length, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    k5, v5 = (z.transpose(0, 2, 1, 3)[:, :, None] for z in (k, v))
    scores = q5 @ k5.swapaxes(-1, -2) / np.sqrt(width)
    p, softmax_vjp = softmax(np.where(allowed[..., None, None, :, :], scores, -np.inf))
    y = (p @ v5).transpose(0, 3, 1, 2, 4).reshape(s, length, heads, v.shape[3])

    def vjp(g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, None]:
        g5 = g.reshape(s, length, groups, heads // groups, -1).transpose(0, 2, 3, 1, 4)
        ds = np.asarray(softmax_vjp(g5 @ v5.swapaxes(-1, -2))[0]) / np.sqrt(width)
        dq = (ds @ k5).transpose(0, 3, 1, 2, 4).reshape(q.shape)
        dk = (ds.swapaxes(-1, -2) @ q5).sum(2).transpose(0, 2, 1, 3)
        dv = (p.swapaxes(-1, -2) @ g5).sum(2).transpose(0, 2, 1, 3)
        return dq, dk, dv, None

    return y, vjp


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> Result:
    lse, _ = logsumexp(logits)
    rows = np.arange(len(targets))

    def vjp(g: np.ndarray) -> tuple[np.ndarray, None]:
        d = np.exp(logits - lse[:, None])
        d[rows, targets] -= 1
        return g[:, None] * d, None

    return lse - logits[rows, targets], vjp
