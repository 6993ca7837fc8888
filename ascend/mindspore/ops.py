"""`ops` in operators that MindSpore has on every device: what the host and the NPU share.

`host_ops` and `npu_ops` take these and replace what has a better form there; their DIFFERENCES say which and why.
Reductions over zero elements are answered here: MindSpore on the host returns uninitialised memory for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from ...backends.protocol import DType
from .autograd import primitive
from .framework import mint, ops

DTYPES: dict[DType, Any] = {
    "float64": ms.float64,
    "float32": ms.float32,
    "bfloat16": ms.bfloat16,
    "float16": ms.float16,
}
_NAMES: dict[Any, DType] = {dtype: name for name, dtype in DTYPES.items()}
MASKED = -1e30
"""Stands for minus infinity in attention scores: the difference of two of them is not NaN."""


# --- between host and device -----------------------------------------------------------------
def asarray(value: np.ndarray) -> Tensor:
    """Copy a host array to the device. Integers become int64, floats keep their dtype."""
    value = np.asarray(value)
    dtype = np.int64 if value.dtype.kind in "iu" else value.dtype
    return Tensor.from_numpy(np.array(value, dtype, order="C", copy=True))


def to_numpy(x: Tensor) -> np.ndarray:
    """Copy to the host, without gradient (bfloat16 arrives as float32). Synchronises."""
    if x.dtype == ms.bfloat16:
        x = x.astype(ms.float32)
    return np.array(x.asnumpy())


def cast(x: Tensor, dtype: DType) -> Tensor:
    """Convert a floating tensor; the gradient is converted back."""
    return x if x.dtype == DTYPES[dtype] else x.astype(DTYPES[dtype])


def dtype_of(x: Tensor) -> DType:
    """Name of a floating tensor's dtype."""
    return _NAMES[x.dtype]


def stop_gradient(x: Tensor) -> Tensor:
    """The same values, cut from the graph."""
    return ops.stop_gradient(x)


class _Block(nn.Cell):
    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__(auto_prefix=False)
        self.fn = fn

    def construct(self, *args: Any) -> Any:
        return self.fn(*args)


def checkpoint(fn: Callable[..., Any], *args: Tensor) -> Any:
    """fn(*args), whose intermediates are dropped and computed again in backward.

    The re-entrant form of `mindspore.recompute` gives zero gradients to the parameters that fn closes over,
    in silence; the form with saved-tensor hooks is right.
    """
    return ms.recompute(_Block(fn), *args, use_reentrant=False)


# --- shape -----------------------------------------------------------------------------------
def concat(parts: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Join along an axis; parts of length zero are allowed."""
    return parts[0] if len(parts) == 1 else mint.cat(list(parts), axis)


def split(x: Tensor, sizes: Sequence[int], axis: int = 0) -> list[Tensor]:
    """Cut along an axis into pieces of the given host sizes; zeros are allowed."""
    return [_dense_gradient(part) for part in mint.split(x, [int(s) for s in sizes], axis)]


def _same(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    return x.contiguous(), ()


def _dense(gradient: Tensor, saved: Sequence[Tensor], inputs: Any, needs: Any) -> tuple[Tensor]:
    return (gradient.contiguous(),)


_dense_gradient = primitive(_same, _dense)
"""MindSpore 2.10 joins gradients of a split by their memory, not their strides: a transposed one arrives scrambled."""


def transpose(x: Tensor, axes: Sequence[int]) -> Tensor:
    """Permute all axes; the result is contiguous."""
    return mint.permute(x, tuple(axes)).contiguous()


# --- element by element and along the last axis ----------------------------------------------
def exp(x: Tensor) -> Tensor:
    return mint.exp(x)


def log(x: Tensor) -> Tensor:
    return mint.log(x)


def sqrt(x: Tensor) -> Tensor:
    return mint.sqrt(x)


def sigmoid(x: Tensor) -> Tensor:
    return mint.sigmoid(x)


def relu(x: Tensor) -> Tensor:
    return mint.nn.functional.relu(x)


def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Elements of a where the boolean condition holds, else of b (broadcast; a or b may be a number)."""
    return mint.where(condition, a, b)


def softmax(x: Tensor) -> Tensor:
    """Along the last axis, stable."""
    return mint.softmax(x, -1)


def _logsumexp(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    if x.size == 0:
        return mint.zeros(x.shape[:-1], dtype=x.dtype), (x,)
    top = mint.amax(x, -1, True)
    top = mint.where(mint.abs(top) < float("inf"), top, 0.0)
    total = mint.log(mint.exp(x - top).sum(-1)) + top.reshape(x.shape[:-1])
    return total, (x, total)


def _logsumexp_backward(gradient: Tensor, saved: Sequence[Tensor], _inputs: Any, _needs: Any) -> tuple[Any, ...]:
    if saved[0].size == 0:
        return (ops.zeros_like(saved[0]),)
    x, total = saved
    shape = (*total.shape, 1)
    return (mint.exp(x - total.reshape(shape)) * gradient.reshape(shape),)


_logsumexp_op = primitive(_logsumexp, _logsumexp_backward)


def logsumexp(x: Tensor) -> Tensor:
    """Along the last axis, which disappears; stable."""
    return _logsumexp_op(x)


# --- selecting -------------------------------------------------------------------------------
def take_along(x_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """x[t, ids[t, k]], shape (T, K). The gradient adds where an id repeats."""
    return mint.gather(x_TE, 1, ids_TK)


# --- compute ---------------------------------------------------------------------------------
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    wide = widen(x)
    inverse = mint.rsqrt((wide * wide).mean(-1).reshape((*x.shape[:-1], 1)) + number(eps, wide))
    return (wide * inverse * widen(weight)).astype(x.dtype), (x, weight, inverse)


def _rms_norm_backward(gradient: Tensor, saved: Sequence[Tensor], _inputs: Any, _needs: Any) -> tuple[Any, ...]:
    x, weight, inverse = saved
    if x.size == 0:
        return ops.zeros_like(x), ops.zeros_like(weight)
    normal, g = widen(x) * inverse, widen(gradient)
    width = x.shape[-1]
    dweight = (g * normal).reshape((-1, width)).sum(0)
    g = g * widen(weight)
    dx = (g - normal * (g * normal).mean(-1).reshape(inverse.shape)) * inverse
    return dx.astype(x.dtype), dweight.astype(weight.dtype)


_rms_norm_op = primitive(_rms_norm, _rms_norm_backward)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight along the last axis; statistics in at least float32."""
    return _rms_norm_op(x, weight, eps)


def rotary(x_SLHA: Tensor, cos_1L1A: Tensor, sin_1L1A: Tensor) -> Tensor:
    """x * cos + (-x2, x1) * sin with (x1, x2) the halves of the last axis; in at least float32."""
    first, second = mint.chunk(x_SLHA, 2, -1)
    return (x_SLHA * cos_1L1A + mint.cat([-second, first], -1) * sin_1L1A).astype(x_SLHA.dtype)


def attention(q_SLHA: Tensor, k_SLHA: Tensor, v_SLHA: Tensor, allowed: Tensor | None) -> Tensor:
    """Causal scaled-dot-product attention, (S, L, H, A); k and v may have fewer heads (grouped queries).

    allowed: None (causal), or boolean (S, L, L), already causal, True where a query (row) may look.
    """
    length = q_SLHA.shape[1]
    if allowed is None:
        allowed = Tensor.from_numpy(np.tril(np.ones((1, length, length), bool)))
    return _attention_op(q_SLHA, k_SLHA, v_SLHA, allowed)


def _attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Queries that share a key head are stacked as rows: (S, G, H/G * L, A) against (S, G, L, A)."""
    sequences, length, heads, width = q.shape
    if q.size == 0:
        return ops.zeros_like(q), (q, k, v, allowed)
    groups = k.shape[2]
    q_g, k_g, v_g = _by_head(q, groups), _by_head(k, groups), _by_head(v, groups)
    scores = mint.matmul(q_g, k_g.swapaxes(-1, -2)) * number(width**-0.5, q)
    scores = scores.reshape((sequences, heads, length, length))
    mask = allowed.reshape((-1, 1, length, length))
    p = mint.softmax(widen(mint.where(mask, scores, MASKED)), -1).astype(q.dtype)
    p = p.reshape((sequences, groups, heads // groups * length, length))
    return _by_position(mint.matmul(p, v_g), q.shape), (q_g, k_g, v_g, p)


def _attention_backward(gradient: Tensor, saved: Sequence[Tensor], _inputs: Any, _needs: Any) -> tuple[Any, ...]:
    if gradient.size == 0:
        return tuple(ops.zeros_like(x) for x in saved[:3])
    q, k, v, p = saved
    g = _by_head(gradient, k.shape[1])
    dp = mint.matmul(g, v.swapaxes(-1, -2))
    ds = p * (dp - (dp * p).sum(-1).reshape((*p.shape[:-1], 1))) * number(q.shape[-1] ** -0.5, q)
    dq, dk = mint.matmul(ds, k), mint.matmul(ds.swapaxes(-1, -2), q)
    dv = mint.matmul(p.swapaxes(-1, -2), g)
    kv_shape = (k.shape[0], k.shape[2], k.shape[1], k.shape[3])
    return _by_position(dq, gradient.shape), _by_position(dk, kv_shape), _by_position(dv, kv_shape)


_attention_op = primitive(_attention, _attention_backward)


def _by_head(x: Tensor, groups: int) -> Tensor:
    """(S, L, H, A) -> (S, G, H/G * L, A)."""
    sequences, length, _, width = x.shape
    return mint.permute(x, (0, 2, 1, 3)).reshape((sequences, groups, -1, width)) if length else x


def _by_position(x: Tensor, shape: Sequence[int]) -> Tensor:
    """(S, G, H/G * L, A) -> (S, L, H, A)."""
    sequences, length, heads, width = shape
    return mint.permute(x.reshape((sequences, heads, length, width)), (0, 2, 1, 3)).contiguous()


def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    wide = widen(logits)
    total, _ = _logsumexp(wide)
    picked = mint.gather(wide, 1, targets.reshape((-1, 1))).reshape(total.shape)
    return total - picked, (logits, targets, total)


def _cross_entropy_backward(gradient: Tensor, saved: Sequence[Tensor], _inputs: Any, _needs: Any) -> tuple[Any, ...]:
    logits, targets, total = saved
    if logits.size == 0:
        return (ops.zeros_like(logits),)
    p = mint.exp(widen(logits) - total.reshape((-1, 1)))
    columns = Tensor.from_numpy(np.arange(logits.shape[1]))
    p = mint.where(columns == targets.reshape((-1, 1)), p - 1.0, p)
    return ((p * gradient.reshape((-1, 1))).astype(logits.dtype),)


_cross_entropy_op = primitive(_cross_entropy, _cross_entropy_backward)


def cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Negative log-likelihood of each target, (T,), in at least float32."""
    return _cross_entropy_op(logits_TV, targets_T)


def number(value: float, like: Tensor) -> Tensor | float:
    """A factor in full precision: MindSpore rounds Python floats to float32 even beside float64 tensors."""
    return Tensor(value, ms.float64) if like.dtype == ms.float64 else value


def widen(x: Tensor) -> Tensor:
    """At least float32: the dtype of statistics and sums."""
    return x if x.dtype in (ms.float32, ms.float64) else x.astype(ms.float32)
