"""`ops` of `ascend-torch`: plain torch, and fused npu_* kernels where they are exact."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ...backends.protocol import DType
from ...backends.torch_shared import ops as shared
from ...backends.torch_shared.ops import (
    argsort,
    checkpoint,
    concat,
    count,
    cross_entropy,
    dtype_of,
    exp,
    invert,
    log,
    logsumexp,
    relu,
    rotary,
    router_topk,
    sigmoid,
    softmax,
    split,
    sqrt,
    stop_gradient,
    sum_rows,
    take_along,
    take_rows,
    to_numpy,
    topk,
    transpose,
    where,
)
from . import kernels
from .experts import combine_rows, expert_mlp, grouped_matmul

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


def asarray(value: np.ndarray) -> Tensor:
    """Copy a host array to this process's NPU. Integers become int64, floats keep their dtype."""
    return shared.asarray(value).to("npu")


def cast(x: Tensor, dtype: DType) -> Tensor:
    """Convert to a floating dtype; the gradient is converted back. ValueError for float64: no device kernels."""
    check_dtype(dtype)
    return shared.cast(x, dtype)


def check_dtype(dtype: DType) -> None:
    """Raise ValueError for a dtype without compute kernels on NPUs."""
    if dtype == "float64":
        raise ValueError(
            "NPUs have no float64 grouped matmul or reduction; choose dtype float32 or bfloat16 for ascend-torch "
            "(float64 works on backend cpu)"
        )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight along the last axis; statistics in at least float32."""
    if x.numel() == 0:
        return shared.rms_norm(x, weight, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    return kernels.rms_norm(x.to(wide), weight.to(wide), eps).to(x.dtype)


def attention(q_SLHA: Tensor, k_SLHA: Tensor, v_SLHA: Tensor, allowed: Tensor | None) -> Tensor:
    """Causal scaled-dot-product attention, (S, L, H, A); k and v may have fewer heads (grouped queries).

    allowed: None (causal), or boolean (S, L, L), already causal, True where a query (row) may look. The fused
    kernel exists in half precision only; float32 takes torch's.
    """
    if q_SLHA.numel() == 0 or q_SLHA.dtype not in (torch.bfloat16, torch.float16):
        return shared.attention(q_SLHA, k_SLHA, v_SLHA, allowed)
    hidden = _causal_block(q_SLHA.device) if allowed is None else ~allowed[:, None]
    return kernels.fusion_attention(q_SLHA, k_SLHA, v_SLHA, hidden, allowed is None)


@lru_cache(maxsize=4)
def _causal_block(device: torch.device) -> Tensor:
    side = kernels.CAUSAL_BLOCK
    return torch.ones((side, side), dtype=torch.bool, device=device).triu(1)
