"""The Ascend operators that have no host kernel: each call in one function, with its guards.

Their argument checks run on any machine; nothing here has run on an NPU yet.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor

from .framework import mint, ops

MAX_GROUPS = 1024
MAX_WIDTH = 65535
"""Limits of the grouped matmul: groups, and elements of a last axis."""
CAUSAL_BLOCK = 2048
"""Side of the triangular mask that flash attention's compressed causal mode (sparse_mode 2) wants."""


def grouped_rows(x_ND: Tensor, w_GDF: Tensor, ends_G: Tensor) -> Tensor:
    """Row blocks ending at ends[g] (int64, the last one all rows) times w[g]: (N, F). N > 0.

    w may be a view with its last axes swapped. ValueError past the kernel's limits.
    """
    _check(x_ND, w_GDF)
    product = ops.auto_generate.grouped_matmul_v4(
        [x_ND], [w_GDF], group_list=ends_G, split_item=3, group_type=0, group_list_type=0
    )
    return product[0]


def grouped_weights(x_ND: Tensor, g_NF: Tensor, ends_G: Tensor) -> Tensor:
    """x[block].T @ g[block] for each row block: (G, D, F). The kernel wants x as a transposed view. N > 0."""
    _check(x_ND, g_NF)
    product = ops.auto_generate.grouped_matmul_v4(
        [mint.transpose(x_ND, 0, 1)], [g_NF], group_list=ends_G, split_item=3, group_type=2, group_list_type=0
    )
    return product[0]


def _check(x: Tensor, w: Tensor) -> None:
    if x.dtype == ms.float64:
        raise ValueError("the grouped matmul has no float64 on NPUs; choose dtype float32 or bfloat16")
    groups = w.shape[0] if len(w.shape) == 3 else 1
    if groups > MAX_GROUPS or max(x.shape[-1], w.shape[-1]) > MAX_WIDTH:
        raise ValueError(
            f"the grouped matmul takes at most {MAX_GROUPS} experts per rank and widths up to {MAX_WIDTH}; "
            f"got {groups} and {max(x.shape[-1], w.shape[-1])}; raise expert_parallel_size or narrow the model"
        )


def swiglu(h: Tensor) -> Tensor:
    """silu(gate) * up with gate the first half of the last axis. The kernel takes contiguous, non-empty tensors."""
    return ops.swiglu(h.contiguous(), -1)


def unpermute(rows_ND: Tensor, index_N: Tensor, weights_TK: Tensor) -> Tensor:
    """y[t] = sum over k of weights[t, k] * rows[index[t * K + k]]; index int32, rows and weights in one dtype."""
    return ops.moe_token_unpermute(rows_ND, index_N, weights_TK)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight; x and weight in one dtype."""
    return ops.rms_norm(x, weight, eps)[0]


def flash_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, causal: bool) -> Tensor:
    """(S, L, H, A) in half precision; hidden: True where a query may not look, (S, 1, L, L) or the causal block."""
    return ops.flash_attention_score(
        q,
        k,
        v,
        q.shape[2],
        attn_mask=hidden,
        scalar_value=q.shape[3] ** -0.5,
        input_layout="BSND",
        sparse_mode=2 if causal else 0,
    )
