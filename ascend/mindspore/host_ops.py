"""`ops` of `mindspore-cpu`: the shared operators, and the host's own form where an Ascend kernel has no host one."""

from __future__ import annotations

import sys
from typing import cast as typed

from mindspore import Tensor

from ...backends import streaming
from ...backends.protocol import DType, Ops
from . import ops
from .host_attention import attention
from .host_experts import expert_mlp, grouped_matmul
from .host_rows import argsort, combine_rows, count, invert, sum_rows, take_rows, topk
from .host_rowwise import cross_entropy, logsumexp, rms_norm, rotary
from .ops import (
    asarray,
    checkpoint,
    concat,
    dtype_of,
    exp,
    log,
    relu,
    sigmoid,
    softmax,
    split,
    sqrt,
    stop_gradient,
    take_along,
    to_numpy,
    transpose,
    where,
)

__all__ = [
    "argsort",
    "asarray",
    "attention",
    "cast",
    "checkpoint",
    "combine_rows",
    "concat",
    "count",
    "cross_entropy",
    "dtype_of",
    "exp",
    "expert_mlp",
    "grouped_matmul",
    "invert",
    "log",
    "logsumexp",
    "relu",
    "rms_norm",
    "rotary",
    "router_topk",
    "sigmoid",
    "softmax",
    "split",
    "sqrt",
    "stop_gradient",
    "sum_rows",
    "take_along",
    "take_rows",
    "to_numpy",
    "topk",
    "transpose",
    "where",
]


def cast(x: Tensor, dtype: DType) -> Tensor:
    """Convert a floating tensor; the gradient is converted back. ValueError for bfloat16: no host kernels."""
    check_dtype(dtype)
    return ops.cast(x, dtype)


def router_topk(
    x_NHD: Tensor, w_HDE: Tensor, bias_HE: Tensor | None, k: int, ids_NHK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(logits, ids) of the k best experts of each row and head; the scores exist a tile at a time."""
    return streaming.router_topk(typed(Ops, sys.modules[__name__]), x_NHD, w_HDE, bias_HE, k, ids_NHK)


def check_dtype(dtype: DType) -> None:
    """Raise ValueError for a dtype without compute kernels on the host."""
    if dtype == "bfloat16":
        raise ValueError(
            "MindSpore computes no bfloat16 on the host; choose dtype float32 or float64 for mindspore-cpu "
            "(bfloat16 works on backends ascend and cpu)"
        )
