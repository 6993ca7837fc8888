"""Grouped matrix products and the expert feed-forward on the host: one product per group that has rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from mindspore import Tensor
from scipy.special import erf

from .autograd import primitive

Activation = Literal["swiglu", "gelu"]


def grouped_matmul(x_ND: Tensor, w_GDF: Tensor, counts_G: Tensor) -> Tensor:
    """Row blocks of x, counts[g] rows each, times w[g]; rows after the last block give exact zeros.

    Groups of zero rows are legal and get exactly zero weight gradient.
    """
    return _grouped_op(x_ND, w_GDF, _host(counts_G))


def expert_mlp(x_ND: Tensor, w_up: Tensor, w_down: Tensor, counts_G: Tensor, activation: Activation) -> Tensor:
    """Grouped feed-forward: act(x @ w_up[g]) @ w_down[g].

    swiglu: w_up is (G, D, 2F), gate columns first, act = silu(gate) * up. gelu: w_up is (G, D, F), exact gelu.
    """
    return _mlp_op(x_ND, w_up, w_down, _host(counts_G), activation)


def _host(counts: Tensor | np.ndarray) -> tuple[int, ...]:
    return tuple(np.asarray(counts.asnumpy() if isinstance(counts, Tensor) else counts).tolist())


def _blocks(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(group, its rows) for the groups that have rows."""
    start = 0
    for group, rows in enumerate(counts):
        if rows:
            yield group, slice(start, start + rows)
        start += rows


def multiply(x: np.ndarray, w: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    y = np.zeros((len(x), w.shape[2]), x.dtype)
    for group, rows in _blocks(counts):
        np.matmul(x[rows], w[group], out=y[rows])
    return y


def multiply_transposed(g: np.ndarray, w: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    return multiply(g, w.swapaxes(1, 2), counts)


def weight_gradient(x: np.ndarray, g: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    dw = np.zeros((len(counts), x.shape[1], g.shape[1]), x.dtype)
    for group, rows in _blocks(counts):
        np.matmul(x[rows].T, g[rows], out=dw[group])
    return dw


def activate(h: np.ndarray, activation: Activation) -> np.ndarray:
    if activation == "gelu":
        return (0.5 * h * (1 + erf(h * 2**-0.5))).astype(h.dtype, copy=False)
    gate, up = np.split(h, 2, axis=1)
    return gate * _sigmoid(gate) * up


def activate_backward(h: np.ndarray, g: np.ndarray, activation: Activation) -> np.ndarray:
    if activation == "gelu":
        density = np.exp(-0.5 * h * h) * (2 * np.pi) ** -0.5
        return (g * (0.5 * (1 + erf(h * 2**-0.5)) + h * density)).astype(h.dtype, copy=False)
    gate, up = np.split(h, 2, axis=1)
    s = _sigmoid(gate)
    return np.concatenate([g * up * s * (1 + gate * (1 - s)), g * gate * s], axis=1)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    """Where the exponential overflows, its reciprocal is the right zero."""
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def _grouped(x: Tensor, w: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    return Tensor.from_numpy(multiply(x.asnumpy(), w.asnumpy(), counts)), (x, w)


def _grouped_backward(gradient: Tensor, saved: Sequence[Tensor], inputs: Any, needs: Any) -> tuple[Any, ...]:
    x, w, g, counts = saved[0].asnumpy(), saved[1].asnumpy(), gradient.asnumpy(), inputs[2]
    dx = Tensor.from_numpy(multiply_transposed(g, w, counts)) if needs[0] else None
    dw = Tensor.from_numpy(weight_gradient(x, g, counts)) if needs[1] else None
    return dx, dw


def _mlp(
    x: Tensor, w_up: Tensor, w_down: Tensor, counts: tuple[int, ...], activation: Activation
) -> tuple[Tensor, tuple[Tensor, ...]]:
    h = multiply(x.asnumpy(), w_up.asnumpy(), counts)
    y = multiply(activate(h, activation), w_down.asnumpy(), counts)
    return Tensor.from_numpy(y), (x, w_up, w_down, Tensor.from_numpy(h))


def _mlp_backward(gradient: Tensor, saved: Sequence[Tensor], inputs: Any, needs: Any) -> tuple[Any, ...]:
    x, w_up, w_down, h = (s.asnumpy() for s in saved)
    g, counts, activation = gradient.asnumpy(), inputs[3], inputs[4]
    dw_down = weight_gradient(activate(h, activation), g, counts) if needs[2] else None
    dh = activate_backward(h, multiply_transposed(g, w_down, counts), activation)
    dw_up = weight_gradient(x, dh, counts) if needs[1] else None
    dx = multiply_transposed(dh, w_up, counts) if needs[0] else None
    return tuple(None if d is None else Tensor.from_numpy(d) for d in (dx, dw_up, dw_down))


_grouped_op = primitive(_grouped, _grouped_backward)
_mlp_op = primitive(_mlp, _mlp_backward)
