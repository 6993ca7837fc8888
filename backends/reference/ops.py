"""Arrays and kernels of the reference: NumPy, always float64. `backends/protocol.py` says what each does.

Slow and plain on purpose: this module is what the other backends are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from ..protocol import DType
from . import kernels, recompute
from .tape import Var, apply, lift


def asarray(value: np.ndarray) -> Var:
    """Copy a host array; floats become float64."""
    return Var(np.array(value))


def to_numpy(x: Var) -> np.ndarray:
    """Copy to a host array."""
    return np.array(lift(x).value)


def cast(x: Var, dtype: DType) -> Var:
    """x in float64, whatever the name: the reference does not round."""
    del dtype
    return apply(lambda a: (a.astype(np.float64), lambda g: (g,)), x)


def dtype_of(x: Var) -> DType:
    """'float64'; TypeError for integers and booleans."""
    if x.value.dtype.kind != "f":
        raise TypeError(f"{x.value.dtype} is not a floating dtype; ask only for floating tensors")
    return "float64"


def stop_gradient(x: Var) -> Var:
    return Var(x.value)


def checkpoint(fn: Callable[..., Any], *args: Var) -> Any:
    """fn(*args), run a second time in backward instead of keeping its intermediates."""
    return recompute.checkpoint(fn, *args)


def concat(parts: Sequence[Var], axis: int = 0) -> Var:
    return apply(kernels.concat, *parts, axis=axis)


def split(x: Var, sizes: Sequence[int], axis: int = 0) -> list[Var]:
    """ValueError unless the sizes add up to the axis."""
    if sum(sizes) != x.shape[axis]:
        raise ValueError(f"sizes {list(sizes)} do not add up to axis {axis} of {x.shape}; pass sizes that do")
    starts = np.cumsum([0, *sizes]).tolist()
    return [apply(kernels.piece, x, start=s, size=n, axis=axis) for s, n in zip(starts, sizes, strict=False)]


def transpose(x: Var, axes: Sequence[int]) -> Var:
    return apply(kernels.transpose, x, axes=tuple(axes))


def exp(x: Var) -> Var:
    return apply(kernels.exp, x)


def log(x: Var) -> Var:
    return apply(kernels.log, x)


def sqrt(x: Var) -> Var:
    return apply(kernels.sqrt, x)


def sigmoid(x: Var) -> Var:
    return apply(kernels.sigmoid, x)


def relu(x: Var) -> Var:
    return apply(kernels.relu, x)


def where(condition: Var, a: Var, b: Var | float) -> Var:
    return apply(kernels.where, condition, a, b)


def softmax(x: Var) -> Var:
    return apply(kernels.softmax, x)


def logsumexp(x: Var) -> Var:
    return apply(kernels.logsumexp, x)


def topk(scores_TE: Var, k: int) -> Var:
    """ValueError when k exceeds the number of experts."""
    scores = lift(scores_TE).value
    if k > scores.shape[1]:
        raise ValueError(f"top {k} of {scores.shape[1]} scores does not exist; choose k <= the number of scores")
    return Var(np.argsort(-np.where(np.isnan(scores), -np.inf, scores), axis=1, kind="stable")[:, :k])


def argsort(keys_N: Var) -> Var:
    return Var(np.argsort(lift(keys_N).value, kind="stable"))


def invert(order_N: Var) -> Var:
    order = lift(order_N).value
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return Var(inverse)


def count(ids: Var, num: int) -> Var:
    flat = lift(ids).value.reshape(-1)
    return Var(np.bincount(flat[(flat >= 0) & (flat < num)], minlength=num))


def take_along(x_TE: Var, ids_TK: Var) -> Var:
    return apply(kernels.take_along, x_TE, ids_TK)


def take_rows(x: Var, index_N: Var) -> Var:
    return apply(kernels.take_rows, x, index_N)


def sum_rows(rows_ND: Var, index_N: Var, num_rows: int) -> Var:
    return apply(kernels.sum_rows, rows_ND, index_N, num_rows=num_rows)


def combine_rows(rows_ND: Var, index_TK: Var, weights_TK: Var) -> Var:
    return apply(kernels.combine_rows, rows_ND, index_TK, weights_TK)


def grouped_matmul(x_ND: Var, w_GDF: Var, counts_G: Var) -> Var:
    """ValueError when the counts are not one per group or exceed the rows."""
    return apply(kernels.grouped_matmul, x_ND, w_GDF, counts_G)


def router_topk(x_NHD: Var, w_HDE: Var, bias_HE: Var | None, k: int, ids_NHK: Var | None = None) -> tuple[Var, Var]:
    """The definition: all scores at once, and a stable sort. ValueError when k exceeds the number of experts."""
    if ids_NHK is None:
        scores = np.einsum("nhd,hde->nhe", x_NHD.value, w_HDE.value)
        scores = scores if bias_HE is None else scores + lift(bias_HE).value
        rows, heads, num = scores.shape
        ids_NHK = topk(Var(scores.reshape(rows * heads, num)), k).reshape((rows, heads, k))
    return apply(kernels.chosen_logits, x_NHD, w_HDE, ids_NHK), ids_NHK


def expert_mlp(x_ND: Var, w_up: Var, w_down: Var, counts_G: Var, activation: Literal["swiglu", "gelu"]) -> Var:
    up = grouped_matmul(x_ND, w_up, counts_G)
    if activation == "gelu":
        return grouped_matmul(apply(kernels.gelu, up), w_down, counts_G)
    gate, linear = split(up, [w_down.shape[1]] * 2, axis=1)
    return grouped_matmul(apply(kernels.silu, gate) * linear, w_down, counts_G)


def rms_norm(x: Var, weight: Var, eps: float) -> Var:
    return apply(kernels.rms_norm, x, weight, eps=eps)


def rotary(x_SLHA: Var, cos_1L1A: Var, sin_1L1A: Var) -> Var:
    return apply(kernels.rotary, x_SLHA, cos_1L1A, sin_1L1A)


def attention(q_SLHA: Var, k_SLHA: Var, v_SLHA: Var, allowed: Var | None) -> Var:
    length = q_SLHA.shape[1]
    mask = np.tril(np.ones((length, length), bool)) if allowed is None else allowed
    return apply(kernels.attention, q_SLHA, k_SLHA, v_SLHA, mask)


def cross_entropy(logits_TV: Var, targets_T: Var) -> Var:
    return apply(kernels.cross_entropy, logits_TV, targets_T)
