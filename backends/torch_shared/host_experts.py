"""Feed-forward of experts on the host as one step of the graph: only the input and its first product are kept."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .host_products import outer_products, products, runs_of
from .host_rows import row_blocks

_aten: Any = torch.ops.aten


class _ExpertMlp(torch.autograd.Function):
    """y = act(x w_up) w_down by runs of rows; backward computes the activations once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_up: Tensor, w_down: Tensor, counts_G: Tensor, activation: str) -> Tensor:
        runs = runs_of(x, w_up, counts_G)
        up = products(x, w_up, runs)
        ctx.save_for_backward(x, w_up, w_down, up)
        ctx.runs, ctx.activation = runs, activation
        return products(_activate(up, activation), w_down, runs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, w_up, w_down, up = ctx.saved_tensors
        runs, d_y = ctx.runs, grads[0]
        d_act = products(d_y, w_down.transpose(1, 2), runs)
        act, d_up = _activation_gradient(up, d_act, ctx.activation)
        d_down = outer_products(act, d_y, runs, w_down)
        del act, d_act
        d_x = products(d_up, w_up.transpose(1, 2), runs)
        return d_x, outer_products(x, d_up, runs, w_up), d_down, None, None


def expert_mlp(x_ND: Tensor, w_up: Tensor, w_down: Tensor, counts_G: Tensor, activation: str) -> Tensor:
    return _ExpertMlp.apply(x_ND, w_up, w_down, counts_G, activation)  # type: ignore[no-any-return]


def _activate(up: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return F.gelu(up)
    gate, linear = up.chunk(2, -1)
    return F.silu(gate).mul_(linear)


def _activation_gradient(up: Tensor, d_act: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(act(up), gradient of up)."""
    if activation == "gelu":
        return F.gelu(up), _aten.gelu_backward(d_act, up)
    act, d_up = torch.empty_like(d_act), torch.empty_like(up)
    for rows in row_blocks(d_act):
        gate, linear = up[rows].chunk(2, -1)
        d_gate, d_linear = d_up[rows].chunk(2, -1)
        silu = F.silu(gate)
        torch.mul(silu, linear, out=act[rows])
        torch.mul(silu, d_act[rows], out=d_linear)
        _aten.silu_backward.grad_input(d_act[rows] * linear, gate, grad_input=d_gate)
    return act, d_up
