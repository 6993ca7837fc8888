"""`ops` of `ascend`: the shared operators, plain row movement, and fused Ascend kernels where they are exact."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import cast as typed

import mindspore as ms
import numpy as np
from mindspore import Tensor

from ...backends import streaming
from ...backends.protocol import DType, Ops
from . import npu_kernels, ops
from .npu_combine import Combine
from .npu_experts import Experts, Kernels
from .ops import (
    asarray,
    checkpoint,
    concat,
    cross_entropy,
    dtype_of,
    exp,
    log,
    logsumexp,
    relu,
    rotary,
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
from .plain_rows import argsort, count, invert, sum_rows, take_rows, topk

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

_experts = Experts(Kernels(npu_kernels.grouped_rows, npu_kernels.grouped_weights, npu_kernels.swiglu))
grouped_matmul = _experts.grouped_matmul
expert_mlp = _experts.expert_mlp
combine_rows = Combine(npu_kernels.unpermute).combine_rows


def cast(x: Tensor, dtype: DType) -> Tensor:
    """Convert to a floating dtype; the gradient is converted back. ValueError for float64: no device kernels."""
    check_dtype(dtype)
    return ops.cast(x, dtype)


def check_dtype(dtype: DType) -> None:
    """Raise ValueError for a dtype without compute kernels on NPUs."""
    if dtype == "float64":
        raise ValueError(
            "NPUs have no float64 grouped matmul or reduction; choose dtype float32 or bfloat16 for ascend "
            "(float64 works on backends mindspore-cpu and cpu)"
        )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight along the last axis; statistics in at least float32."""
    if x.size == 0:
        return ops.rms_norm(x, weight, eps)
    return npu_kernels.rms_norm(ops.widen(x), ops.widen(weight), eps).astype(x.dtype)


def attention(q_SLHA: Tensor, k_SLHA: Tensor, v_SLHA: Tensor, allowed: Tensor | None) -> Tensor:
    """Causal scaled-dot-product attention, (S, L, H, A); k and v may have fewer heads (grouped queries).

    allowed: None (causal), or boolean (S, L, L), already causal, True where a query (row) may look. Flash
    attention exists in half precision only; float32 takes the plain form.
    """
    if q_SLHA.size == 0 or q_SLHA.dtype not in (ms.bfloat16, ms.float16):
        return ops.attention(q_SLHA, k_SLHA, v_SLHA, allowed)
    causal = allowed is None
    hidden = _causal_block() if allowed is None else (~allowed).reshape((allowed.shape[0], 1, *allowed.shape[1:]))
    return npu_kernels.flash_attention(q_SLHA, k_SLHA, v_SLHA, hidden, causal)


@lru_cache(maxsize=1)
def _causal_block() -> Tensor:
    side = npu_kernels.CAUSAL_BLOCK
    return Tensor.from_numpy(np.triu(np.ones((side, side), bool), 1))


def router_topk(
    x_NHD: Tensor, w_HDE: Tensor, bias_HE: Tensor | None, k: int, ids_NHK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(logits, ids) of the k best experts of each row and head; the scores exist a tile at a time."""
    return streaming.router_topk(typed(Ops, sys.modules[__name__]), x_NHD, w_HDE, bias_HE, k, ids_NHK)
