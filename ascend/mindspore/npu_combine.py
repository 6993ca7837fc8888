"""Weighted sums of expert outputs through one fused kernel, which knows neither dropped copies nor empty ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mindspore as ms
from mindspore import Tensor

from .autograd import primitive
from .framework import mint
from .ops import widen
from .plain_rows import combine_backward

MAX_COPIES = 2**24 - 2
MAX_CHOICES = 512
"""Limits of moe_token_unpermute: token copies, and choices per token."""

Unpermute = Callable[[Tensor, Tensor, Tensor], Tensor]


class Combine:
    """Ops.combine_rows over unpermute(rows, index, weights): see `npu_kernels`."""

    def __init__(self, unpermute: Unpermute) -> None:
        self._unpermute = unpermute
        self._op = primitive(self._forward, combine_backward)

    def combine_rows(self, rows_ND: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """y[t] = sum over k, in order, of weights[t, k] * rows[index[t, k]]; index -1 contributes exact zeros.

        Sums in at least float32, result in the dtype of rows. Each row is referenced at most once, so the
        gradient to rows is a gather.
        """
        return self._op(rows_ND, index_TK, weights_TK)

    def _forward(self, rows: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Dropped copies read a zero row behind the others: a zero weight alone would let NaN through."""
        saved = (rows, index, weights)
        (tokens, choices), (count, width) = index.shape, rows.shape
        if tokens == 0 or count == 0:
            return mint.zeros((tokens, width), dtype=rows.dtype), saved
        if tokens * choices > MAX_COPIES or choices > MAX_CHOICES:
            raise ValueError(
                f"combining takes at most {MAX_COPIES} token copies and {MAX_CHOICES} experts per token on NPUs; "
                f"got {tokens} x {choices}; lower micro_batch_size"
            )
        padded = mint.cat([widen(rows), mint.zeros((1, width), dtype=widen(rows).dtype)])
        slots = mint.where(index >= 0, index, count).reshape((-1,)).astype(ms.int32)
        factors = mint.where(index >= 0, widen(weights), 0.0)
        return self._unpermute(padded, slots, factors).astype(rows.dtype), saved
