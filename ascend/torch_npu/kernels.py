"""The npu_* operators in use: each call in one function, with its guards.

Called through `torch.ops.npu`, so that importing this file needs neither torch-npu nor CANN. The tests bind every
call to the recorded schemas; nothing here has run on an NPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MAX_GROUPS = 1024
MAX_WIDTH = 65535
"""Limits of the grouped matmul: groups, and elements of a last axis."""
MAX_COPIES = 2**24 - 2
MAX_CHOICES = 512
"""Limits of the unpermute: token copies, and choices per token."""
CAUSAL_BLOCK = 2048
"""Side of the triangular mask that fusion attention's compressed causal mode (sparse_mode 2) wants."""


def _npu() -> Any:
    return torch.ops.npu


def grouped_rows(x_ND: Tensor, w_GDF: Tensor, ends_G: Tensor) -> Tensor:
    """Row blocks ending at ends[g] (int64, the last one all rows) times w[g]: (N, F). N > 0; no derivative.

    w may be a view with its last axes swapped. ValueError past the kernel's limits.
    """
    _check(x_ND, w_GDF)
    return _npu().npu_grouped_matmul([x_ND], [w_GDF], group_list=ends_G, split_item=3, group_type=0, group_list_type=0)[
        0
    ]


def grouped_weights(x_ND: Tensor, g_NF: Tensor, ends_G: Tensor) -> Tensor:
    """x[block].T @ g[block] for each row block: (G, D, F). The kernel wants x as a transposed view. N > 0."""
    _check(x_ND, g_NF)
    return _npu().npu_grouped_matmul(
        [x_ND.t()], [g_NF], group_list=ends_G, split_item=3, group_type=2, group_list_type=0
    )[0]


def _check(x: Tensor, w: Tensor) -> None:
    groups = w.shape[0] if w.dim() == 3 else 1
    if groups > MAX_GROUPS or max(x.shape[-1], w.shape[-1]) > MAX_WIDTH:
        raise ValueError(
            f"the grouped matmul takes at most {MAX_GROUPS} experts per rank and widths up to {MAX_WIDTH}; "
            f"got {groups} and {max(x.shape[-1], w.shape[-1])}; raise expert_parallel_size or narrow the model"
        )


def swiglu(h: Tensor) -> Tensor:
    """silu(gate) * up with gate the first half of the last axis. The kernel takes contiguous, non-empty tensors."""
    return _npu().npu_swiglu(h.contiguous(), -1)


def unpermute(rows_ND: Tensor, index_N: Tensor, weights_TK: Tensor) -> Tensor:
    """y[t] = sum over k of weights[t, k] * rows[index[t * K + k]]; index int32, rows and weights in one dtype."""
    copies, choices = index_N.shape[0], weights_TK.shape[1]
    if copies > MAX_COPIES or choices > MAX_CHOICES:
        raise ValueError(
            f"combining takes at most {MAX_COPIES} token copies and {MAX_CHOICES} experts per token on NPUs; "
            f"got {copies} and {choices}; lower micro_batch_size"
        )
    return _npu().npu_moe_token_unpermute(rows_ND, index_N, weights_TK)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight; x and weight in one dtype."""
    return _npu().npu_rms_norm(x, weight, eps)[0]


def fusion_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, causal: bool) -> Tensor:
    """(S, L, H, A) in half precision; hidden: True where a query may not look, (S, 1, L, L) or the causal block."""
    return _npu().npu_fusion_attention(
        q,
        k,
        v,
        q.shape[2],
        "BSND",
        atten_mask=hidden,
        scale=q.shape[3] ** -0.5,
        sparse_mode=2 if causal else 0,
    )[0]
