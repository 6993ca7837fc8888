"""The operations in plain torch: all of `cpu`, and what `cuda` and `ascend-torch` do not replace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from ..protocol import DType
from .router import router_topk, topk

__all__ = ["router_topk", "topk"]

_DTYPES: dict[DType, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_NAMES: dict[torch.dtype, DType] = {dtype: name for name, dtype in _DTYPES.items()}


def asarray(value: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(value, dtype=np.int64 if value.dtype.kind in "iu" else None, order="C"))


def to_numpy(x: Tensor) -> np.ndarray:
    x = x.detach()
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return x.cpu().numpy().copy() if x.device.type == "cpu" else x.cpu().numpy()


def cast(x: Tensor, dtype: DType) -> Tensor:
    return x.to(_DTYPES[dtype])


def dtype_of(x: Tensor) -> DType:
    return _NAMES[x.dtype]


def stop_gradient(x: Tensor) -> Tensor:
    return x.detach()


def checkpoint(fn: Callable[..., Any], *args: Tensor) -> Any:
    return torch_checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False)


def concat(parts: Sequence[Tensor], axis: int = 0) -> Tensor:
    return torch.cat(list(parts), dim=axis)


def split(x: Tensor, sizes: Sequence[int], axis: int = 0) -> list[Tensor]:
    return list(torch.split(x, list(sizes), dim=axis))


def transpose(x: Tensor, axes: Sequence[int]) -> Tensor:
    return x.permute(*axes).contiguous()


def exp(x: Tensor) -> Tensor:
    return torch.exp(x)


def log(x: Tensor) -> Tensor:
    return torch.log(x)


def sqrt(x: Tensor) -> Tensor:
    return torch.sqrt(x)


def sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


def relu(x: Tensor) -> Tensor:
    return torch.relu(x)


def where(condition: Tensor, a: Any, b: Any) -> Tensor:
    return torch.where(condition, a, b)


def softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def logsumexp(x: Tensor) -> Tensor:
    return torch.logsumexp(x, -1)


def plain_topk(scores_TE: Tensor, k: int) -> Tensor:
    """torch's own top-k, equal scores in any order: what `bench router` compares with; not part of the contract."""
    return torch.topk(scores_TE, k, dim=-1).indices


def argsort(keys_N: Tensor) -> Tensor:
    return torch.sort(keys_N, stable=True).indices


def invert(order_N: Tensor) -> Tensor:
    inverse = torch.empty_like(order_N)
    inverse[order_N] = torch.arange(order_N.shape[0], device=order_N.device)
    return inverse


def count(ids: Tensor, num: int) -> Tensor:
    flat = ids.reshape(-1)
    inside = (flat >= 0) & (flat < num)
    return torch.bincount(torch.where(inside, flat, num), minlength=num + 1)[:num]


def take_along(x_TE: Tensor, ids_TK: Tensor) -> Tensor:
    return torch.gather(x_TE, -1, ids_TK)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index_N: Tensor) -> Tensor:
        ctx.save_for_backward(index_N)
        ctx.num_rows = x.shape[0]
        if x.shape[0] == 0:
            return x.new_zeros((index_N.shape[0], *x.shape[1:]))
        rows = x.index_select(0, index_N.clamp(min=0))
        missing = index_N < 0
        return rows.masked_fill_(missing.reshape(-1, *[1] * (x.dim() - 1)), 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum_rows(grads[0], ctx.saved_tensors[0], ctx.num_rows), None


def _sum_rows(rows: Tensor, index_N: Tensor, num_rows: int) -> Tensor:
    wide = rows.dtype if rows.dtype == torch.float64 else torch.float32
    total = rows.new_zeros((num_rows + 1, *rows.shape[1:]), dtype=wide)
    total.index_add_(0, torch.where(index_N < 0, num_rows, index_N), rows.to(wide))
    return total[:num_rows].to(rows.dtype)


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index_N: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(index_N)
        return _sum_rows(rows, index_N, num_rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return take_rows(grads[0].contiguous(), ctx.saved_tensors[0]), None, None


def take_rows(x: Tensor, index_N: Tensor) -> Tensor:
    return _TakeRows.apply(x, index_N)  # type: ignore[no-any-return]


def sum_rows(rows_ND: Tensor, index_N: Tensor, num_rows: int) -> Tensor:
    return _SumRows.apply(rows_ND, index_N, num_rows)  # type: ignore[no-any-return]


class _CombineRows(torch.autograd.Function):
    """y = sum_k w * rows[index]; saves rows, index and weights. Row gradients are written by index: no sums."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows, index_TK, weights_TK)
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = rows.new_zeros((index_TK.shape[0], *rows.shape[1:]), dtype=wide)
        if rows.shape[0] == 0:
            return total.to(rows.dtype)
        for k in range(index_TK.shape[1]):
            picked, weight = _pick(rows, index_TK[:, k], weights_TK[:, k], wide)
            total.addcmul_(picked, weight)
        return total.to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor]:
        rows, index_TK, weights_TK = ctx.saved_tensors
        wide = torch.promote_types(rows.dtype, torch.float32)
        d_y = grads[0].to(wide)
        d_rows = rows.new_zeros((rows.shape[0] + 1, *rows.shape[1:]))
        d_weights = torch.zeros_like(weights_TK)
        if rows.shape[0] == 0:
            return d_rows[:0], None, d_weights
        for k in range(index_TK.shape[1]):
            index = index_TK[:, k]
            picked, weight = _pick(rows, index, weights_TK[:, k], wide)
            d_weights[:, k] = (d_y * picked).sum(-1).to(d_weights.dtype)
            d_rows[torch.where(index < 0, rows.shape[0], index)] = (d_y * weight).to(rows.dtype)
        return d_rows[:-1], None, d_weights


def _pick(rows: Tensor, index_T: Tensor, weights_T: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows by index (zeros for -1) and their weights as a column (zeros for -1)."""
    missing = (index_T < 0)[:, None]
    picked = rows.index_select(0, index_T.clamp(min=0)).to(wide).masked_fill_(missing, 0)
    return picked, weights_T[:, None].to(wide).masked_fill(missing, 0)


def combine_rows(rows_ND: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    return _CombineRows.apply(rows_ND, index_TK, weights_TK)  # type: ignore[no-any-return]


def _blocks(counts_G: Tensor, num_rows: int) -> list[tuple[int, int]]:
    ends = np.cumsum(counts_G.tolist(), dtype=np.int64).tolist()
    assert not ends or ends[-1] <= num_rows, "counts exceed the rows"
    return list(zip([0, *ends][:-1], ends, strict=True))


class _GroupedMatmul(torch.autograd.Function):
    """A loop of matmuls into preallocated outputs: no copies, no autograd node per group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, counts_G: Tensor) -> Tensor:
        blocks = _blocks(counts_G, x.shape[0])
        ctx.save_for_backward(x, w)
        ctx.blocks = blocks
        y = x.new_empty((x.shape[0], w.shape[2]))
        for g, (a, b) in enumerate(blocks):
            if b > a:
                torch.mm(x[a:b], w[g], out=y[a:b])
        y[blocks[-1][1] if blocks else 0 :].zero_()
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w = ctx.saved_tensors
        d_y = grads[0]
        d_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        d_w = torch.empty_like(w) if ctx.needs_input_grad[1] else None
        for g, (a, b) in enumerate(ctx.blocks):
            if d_x is not None and b > a:
                torch.mm(d_y[a:b], w[g].t(), out=d_x[a:b])
            if d_w is not None:
                torch.mm(x[a:b].t(), d_y[a:b], out=d_w[g]) if b > a else d_w[g].zero_()
        if d_x is not None:
            d_x[ctx.blocks[-1][1] if ctx.blocks else 0 :].zero_()
        return d_x, d_w, None


def grouped_matmul(x_ND: Tensor, w_GDF: Tensor, counts_G: Tensor) -> Tensor:
    return _GroupedMatmul.apply(x_ND, w_GDF, counts_G)  # type: ignore[no-any-return]


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up from one (N, 2F) tensor; only the input is saved."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, -1)
        sigmoid = torch.sigmoid(gate)
        torch.mul(gate, sigmoid, out=d_up)
        # d silu = sigmoid + silu (1 - sigmoid)
        torch.addcmul(sigmoid, d_up, 1 - sigmoid, out=d_gate)
        d_gate.mul_(up).mul_(grads[0])
        d_up.mul_(grads[0])
        return d_gate_up


def activate(x: Tensor, activation: str) -> Tensor:
    return _SwiGLU.apply(x) if activation == "swiglu" else F.gelu(x)  # type: ignore[no-any-return]


def expert_mlp(x_ND: Tensor, w_up: Tensor, w_down: Tensor, counts_G: Tensor, activation: str) -> Tensor:
    hidden = activate(grouped_matmul(x_ND, w_up, counts_G), activation)
    return grouped_matmul(hidden, w_down, counts_G)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), (x.shape[-1],), weight.to(wide), eps).to(x.dtype)


def rotary(x_SLHA: Tensor, cos_1L1A: Tensor, sin_1L1A: Tensor) -> Tensor:
    first, second = x_SLHA.chunk(2, -1)
    return (x_SLHA * cos_1L1A + torch.cat([-second, first], -1) * sin_1L1A).to(x_SLHA.dtype)


def attention(q_SLHA: Tensor, k_SLHA: Tensor, v_SLHA: Tensor, allowed: Tensor | None) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q_SLHA, k_SLHA, v_SLHA))
    mask = None if allowed is None else allowed[:, None]
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=allowed is None, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y.transpose(1, 2).contiguous()


def cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    return F.cross_entropy(logits_TV.to(wide), targets_T, reduction="none")
