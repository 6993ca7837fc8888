"""`ops` of `cuda`: plain torch, with what is faster, deterministic or free of host synchronisation on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.torch_shared import ops as shared
from ..backends.torch_shared.ops import (
    argsort,
    attention,
    cast,
    checkpoint,
    combine_rows,
    concat,
    cross_entropy,
    dtype_of,
    exp,
    invert,
    log,
    logsumexp,
    plain_topk,
    relu,
    rms_norm,
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
    "plain_topk",
    "relu",
    "rms_norm",
    "rotary",
    "routed_mlp",
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

_MOST_GROUPS = 1023
"""torch's grouped product takes fewer than 1024 groups a call."""


def asarray(value: np.ndarray) -> Tensor:
    """Copy a host array to this process's GPU without waiting for it."""
    return shared.asarray(value).pin_memory().to("cuda", non_blocking=True)


def count(ids: Tensor, num: int) -> Tensor:
    """Integer sums: exact in any order, and no copy to the host (bincount makes one)."""
    flat = ids.reshape(-1).to(torch.int64)
    bins = torch.where((flat >= 0) & (flat < num), flat, num)
    return torch.zeros(num + 1, dtype=torch.int64, device=ids.device).scatter_add_(0, bins, torch.ones_like(bins))[:num]


def topk(scores_TE: Tensor, k: int) -> Tensor:
    """A stable sort; for float32 top-k of keys that hold score and id, in which nothing ties."""
    scores = torch.nan_to_num(scores_TE.detach(), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if scores.dtype != torch.float32:
        return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :k].contiguous()
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # + 0.0: minus zero ties with zero
    ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    ids = torch.arange(scores.shape[1], device=scores.device)
    keys = (ordered << 20) + (0xFFFFF - ids)
    return 0xFFFFF - (torch.topk(keys, k, dim=-1).values & 0xFFFFF)


def router_topk(
    x_NHD: Tensor, w_HDE: Tensor, bias_HE: Tensor | None, k: int, ids_NHK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """bfloat16 tokens: one kernel, nothing waits for the host. Else tiles of scores in plain torch."""
    from .kernels import router

    choice = router.Selection(k)
    if router.fits(x_NHD, w_HDE, choice):
        return router.router_topk(x_NHD, w_HDE, bias_HE, choice, ids_NHK)
    return shared.router_topk(x_NHD, w_HDE, bias_HE, k, ids_NHK)


class _SumRows(torch.autograd.Function):
    """Repeated indices are sorted and added in order: no atomics (index_put_ accumulates so; index_add_ does not)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index_N: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(index_N)
        return _sum_rows(rows, index_N, num_rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _pick_rows(grads[0].contiguous(), ctx.saved_tensors[0]), None, None


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index_N: Tensor) -> Tensor:
        ctx.save_for_backward(index_N)
        ctx.num_rows = x.shape[0]
        return _pick_rows(x, index_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum_rows(grads[0], ctx.saved_tensors[0], ctx.num_rows), None


def _pick_rows(x: Tensor, index_N: Tensor) -> Tensor:
    if x.shape[0] == 0:
        return x.new_zeros((index_N.shape[0], *x.shape[1:]))
    rows = x.index_select(0, index_N.clamp(min=0))
    return rows.masked_fill_((index_N < 0).reshape(-1, *[1] * (x.dim() - 1)), 0)


def _sum_rows(rows: Tensor, index_N: Tensor, num_rows: int) -> Tensor:
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = rows.new_zeros((num_rows + 1, *rows.shape[1:]), dtype=wide)
    if rows.shape[0]:
        total.index_put_((torch.where(index_N < 0, num_rows, index_N),), rows.to(wide), accumulate=True)
    return total[:num_rows].to(rows.dtype)


def take_rows(x: Tensor, index_N: Tensor) -> Tensor:
    return _TakeRows.apply(x, index_N)  # type: ignore[no-any-return]


def sum_rows(rows_ND: Tensor, index_N: Tensor, num_rows: int) -> Tensor:
    return _SumRows.apply(rows_ND, index_N, num_rows)  # type: ignore[no-any-return]


def routed_mlp(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor | None:
    """y (T, D) of all experts on this card: rows are gathered inside the kernels, never written. Not in the contract.

    SwiGLU where w_up is twice as wide as w_down is deep, else GELU. None for what the kernels do not take: other
    dtypes than bfloat16, widths that are no multiples of 64, no tokens.
    """
    if x_TD.dtype != torch.bfloat16 or not _fits(x_TD, w_up, w_down):
        return None
    from .kernels.experts import moe_mlp

    return moe_mlp(x_TD, ids_TK, weights_TK, w_up, w_down)


def _fits(x: Tensor, w_up: Tensor, w_down: Tensor) -> bool:
    widths = (*w_up.shape[1:], w_down.shape[1])
    return all(size % 64 == 0 and size for size in widths) and x.shape[0] > 0 and w_up.shape[0] > 0


def grouped_matmul(x_ND: Tensor, w_GDF: Tensor, counts_G: Tensor) -> Tensor:
    """bfloat16: torch's grouped product, no copy to the host. Other dtypes: one exact product per group."""
    groups, width, out = w_GDF.shape
    aligned = width % 8 == 0 and out % 8 == 0
    if x_ND.dtype != torch.bfloat16 or not aligned or groups > _MOST_GROUPS or x_ND.shape[0] == 0 or groups == 0:
        return shared.grouped_matmul(x_ND, w_GDF, counts_G)
    ends = torch.cumsum(counts_G, 0).to(torch.int32)
    outside = (torch.arange(x_ND.shape[0], device=x_ND.device) >= ends[-1])[:, None]
    y = F.grouped_mm(torch.where(outside, 0, x_ND), w_GDF, offs=ends)
    return torch.where(outside, 0, y)


def expert_mlp(x_ND: Tensor, w_up: Tensor, w_down: Tensor, counts_G: Tensor, activation: str) -> Tensor:
    """bfloat16 with widths that are multiples of 64: the Triton kernels. Else grouped products."""
    if x_ND.dtype == torch.bfloat16 and _fits(x_ND, w_up, w_down):
        from .kernels.experts import sorted_mlp

        return sorted_mlp(x_ND, w_up.contiguous(), w_down.contiguous(), counts_G)  # borrowed stacks arrive as views
    hidden = shared.activate(grouped_matmul(x_ND, w_up, counts_G), activation)
    return grouped_matmul(hidden, w_down, counts_G)
