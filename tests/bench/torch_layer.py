"""The peer that ships with torch: a routed SwiGLU layer on `grouped_mm`, written well; and the dense yardstick."""

from __future__ import annotations

import torch
from torch.nn import functional


class _Spread(torch.autograd.Function):
    """Rows x[token] in sorted order; its gradient is a gather by the inverse, not an index_add."""

    @staticmethod
    def forward(ctx, x, token, position):
        ctx.save_for_backward(position)
        return x[token]

    @staticmethod
    def backward(ctx, *grads):
        (position,) = ctx.saved_tensors
        return grads[0][position].float().sum(1).to(grads[0].dtype), None, None


class _Gather(torch.autograd.Function):
    """Sum of each token's k rows; its gradient is the spread."""

    @staticmethod
    def forward(ctx, rows, token, position):
        ctx.save_for_backward(token)
        return rows[position].float().sum(1).to(rows.dtype)

    @staticmethod
    def backward(ctx, *grads):
        (token,) = ctx.saved_tensors
        return grads[0][token], None, None


def torch_moe(x, ids, weights, w_up, w_down):
    """int16 sort, grouped_mm, routing weight applied before the down GEMM."""
    tokens, top_k = ids.shape
    num_experts = w_up.shape[0]
    keys, order = torch.sort(ids.reshape(-1).to(torch.int16), stable=True)
    bounds = torch.arange(1, num_experts + 1, dtype=torch.int16, device=x.device)
    offs = torch.searchsorted(keys, bounds, out_int32=True)
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel(), device=x.device)
    position = position.reshape(tokens, top_k)
    token = order // top_k
    rows = _Spread.apply(x, token, position)
    gate, up = functional.grouped_mm(rows, w_up, offs=offs).chunk(2, dim=-1)
    act = functional.silu(gate) * up * weights.reshape(-1)[order][:, None].to(x.dtype)
    return _Gather.apply(functional.grouped_mm(act, w_down, offs=offs), token, position)


def dense_forward(x, w_up, w_down):
    """Two GEMMs with the layer's floating-point operations and nothing else."""
    return (x @ w_up)[:, : w_down.shape[0]] @ w_down


def dense_step(x, h, act, g, w_up, w_down):
    """The four GEMMs of the backward pass: d_act, d_x, dW1, dW2."""
    return g @ w_down.T, h @ w_up.T, x.T @ h, act.T @ g
