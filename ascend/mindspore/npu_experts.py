"""Grouped products and the expert feed-forward from two grouped kernels, which know neither gradients nor padding.

The kernels are handed in, so that the arithmetic around them runs in tests without an NPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mindspore as ms
from mindspore import Tensor

from .autograd import primitive
from .framework import mint, ops
from .ops import number

Activation = Literal["swiglu", "gelu"]


@dataclass(frozen=True)
class Kernels:
    """rows(x, w, ends), weights(x, g, ends), swiglu(h): see `npu_kernels`."""

    rows: Callable[[Tensor, Tensor, Tensor], Tensor]
    weights: Callable[[Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor], Tensor]


class Experts:
    """Ops.grouped_matmul and Ops.expert_mlp over grouped kernels."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._product = primitive(self._forward, self._backward)

    def grouped_matmul(self, x_ND: Tensor, w_GDF: Tensor, counts_G: Tensor) -> Tensor:
        """Row blocks of x, counts[g] rows each, times w[g]; rows after the last block give exact zeros.

        Groups of zero rows are legal and get exactly zero weight gradient.
        """
        return self._product(x_ND, w_GDF, counts_G)

    def expert_mlp(
        self, x_ND: Tensor, w_up: Tensor, w_down: Tensor, counts_G: Tensor, activation: Activation
    ) -> Tensor:
        """Grouped feed-forward: act(x @ w_up[g]) @ w_down[g].

        swiglu: w_up is (G, D, 2F), gate columns first, act = silu(gate) * up. gelu: w_up is (G, D, F), exact gelu.
        """
        h = self.grouped_matmul(x_ND, w_up, counts_G)
        if activation == "gelu":
            h = h * (mint.erf(h * number(2**-0.5, h)) + 1.0) * 0.5
        elif h.shape[0]:
            h = self._kernels.swiglu(h)
        else:
            h = mint.narrow(h, 1, 0, w_down.shape[1])
        return self.grouped_matmul(h, w_down, counts_G)

    def _forward(self, x: Tensor, w: Tensor, counts: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        if x.shape[0] == 0:
            return mint.zeros((0, w.shape[2]), dtype=x.dtype), (x, w, counts)
        ends, real = _blocks(counts, x.shape[0])
        return _only(real, self._kernels.rows(x, w, ends)), (x, w, counts)

    def _backward(self, gradient: Tensor, saved: Sequence[Tensor], _inputs: Any, needs: Any) -> tuple[Any, ...]:
        """dx = g w^T and dw = x^T g by row blocks; a block without rows gets zeros, whatever the kernel left there."""
        x, w, counts = saved
        if x.shape[0] == 0:
            return ops.zeros_like(x), ops.zeros_like(w), None
        ends, real = _blocks(counts, x.shape[0])
        g = _only(real, gradient)
        dx = _only(real, self._kernels.rows(g, mint.transpose(w, 1, 2), ends)) if needs[0] else None
        dw = (
            _only((counts > 0).reshape((-1, 1, 1)), self._kernels.weights(_only(real, x), g, ends))
            if needs[1]
            else None
        )
        return dx, dw, None


def _blocks(counts: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """(G,) ends of the row blocks, the last one stretched over padding rows; (N, 1) True where a row is real.

    The kernel wants the last end to be the number of rows, which the host does not know without a wait.
    """
    ends = ops.cumsum(counts, 0)
    groups = counts.shape[0]
    total = mint.narrow(ends, 0, groups - 1, 1)
    stretched = mint.cat([mint.narrow(ends, 0, 0, groups - 1), ops.zeros_like(total) + rows])
    return stretched.astype(ms.int64), (ops.arange(rows) < total).reshape((-1, 1))


def _only(real: Tensor, x: Tensor) -> Tensor:
    return mint.where(real, x, ops.zeros_like(x))
