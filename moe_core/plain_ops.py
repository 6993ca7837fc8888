"""The contract's fused operations made of its elementary ones: for a device whose software lacks a fused kernel
(`train.plain_ops`), and to measure what fusing is worth (`twinmoe bench layer`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Literal, cast

from ..backends.protocol import Array, Ops

Activation = Literal["swiglu", "gelu"]


def plain_ops(ops: Ops) -> Ops:
    """The same contract; swiglu experts, weighted sums and RMS norms are sequences of elementary operations."""

    def expert_mlp(x_ND: Array, w_up: Array, w_down: Array, counts_G: Array, activation: Activation) -> Array:
        if activation != "swiglu":  # the contract has no error function for a plain gelu
            return ops.expert_mlp(x_ND, w_up, w_down, counts_G, activation)
        half = w_down.shape[1]
        gate, linear = ops.split(ops.grouped_matmul(x_ND, w_up, counts_G), [half, half], 1)
        return ops.grouped_matmul(gate * ops.sigmoid(gate) * linear, w_down, counts_G)

    def combine_rows(rows_ND: Array, index_TK: Array, weights_TK: Array) -> Array:
        (tokens, top_k), width = index_TK.shape, rows_ND.shape[1]
        wide = ops.cast(ops.take_rows(rows_ND, index_TK.reshape((-1,))), ops.dtype_of(weights_TK))
        y_TKD = (wide * weights_TK.reshape((-1, 1))).reshape((tokens, top_k, width))
        return ops.cast(y_TKD.sum(1), ops.dtype_of(rows_ND))

    return replaced(ops, {"expert_mlp": expert_mlp, "combine_rows": combine_rows})


def replaced(ops: Ops, functions: Mapping[str, Callable[..., Any]]) -> Ops:
    """The contract with some functions of one's own."""
    return cast(Ops, SimpleNamespace(**{**contract_of(ops), **functions}))


def contract_of(ops: Ops) -> dict[str, Callable[..., Any]]:
    """What the contract names, and no more."""
    return {name: getattr(ops, name) for name in vars(Ops) if not name.startswith("_")}
