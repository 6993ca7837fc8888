"""Differentiable expert layers on the kernels: routed (`moe_mlp`) and on rows sorted by expert (`sorted_mlp`)."""

from __future__ import annotations

from typing import Any

import torch

from . import launch, small
from .gather_sum import gather_sum
from .grouping import Grouping, Routing, group_rows, route_rows

Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def routed_outputs(
    x, weights, w_up, w_down, routing: Routing, save: bool, on: launch.Card
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(y, pre-activation if `save`) of `MoeMlp`."""
    gated = w_up.shape[2] == 2 * w_down.shape[1]
    act, h = launch.up(x, w_up, routing, routing.position.numel(), gated, save, on)
    rows = launch.rows(act, w_down, routing.grouping, False, on)
    return gather_sum(rows, routing.position, weights), h


def routed_gradients(
    grad, x, weights, w_up, w_down, h, routing: Routing, needs: tuple[bool, ...], on: launch.Card
) -> Gradients:
    """Gradients of x, weights, w_up, w_down, where needed."""
    need_x, need_weights, need_up, need_down = needs
    dh, act, d_weights = launch.activation_grad(grad, w_down, h, weights, routing, on)
    d_down = launch.weight_grad(act, grad, routing, "b", "down", on) if need_down else None
    del act
    d_x = None
    if need_x:
        rows = launch.rows(dh, w_up, routing.grouping, True, on)
        d_x = gather_sum(rows, routing.position, None)
        del rows
    d_up = launch.weight_grad(x, dh, routing, "a", "up", on) if need_up else None
    assert d_weights is not None
    return d_x, d_weights.view_as(weights).to(weights.dtype) if need_weights else None, d_up, d_down


class MoeMlp(torch.autograd.Function):
    """y[t] = sum over k of weights[t, k] * f(x[t] @ w_up[e]) @ w_down[e], e = ids[t, k]. Saves x, h and indices."""

    @staticmethod
    def forward(ctx: Any, x, weights, w_up, w_down, routing: Routing, on: launch.Card):
        save = any(ctx.needs_input_grad[:4])
        y, h = routed_outputs(x, weights, w_up, w_down, routing, save, on)
        if save:
            ctx.save_for_backward(x, weights, w_up, w_down, h)
            ctx.routing, ctx.on = routing, on
        return y

    @staticmethod
    def backward(ctx: Any, *grads):
        needs = ctx.needs_input_grad[:4]
        found = routed_gradients(grads[0].contiguous(), *ctx.saved_tensors, ctx.routing, needs, ctx.on)
        return *found, None, None


class SortedMlp(torch.autograd.Function):
    """f(x @ w_up[e]) @ w_down[e] on rows sorted by expert; rows of no expert give exact zeros."""

    @staticmethod
    def forward(ctx: Any, x, w_up, w_down, grouping: Grouping, on: launch.Card):
        gated = w_up.shape[2] == 2 * w_down.shape[1]
        save = any(ctx.needs_input_grad[:3])
        act, h = launch.up(x, w_up, grouping, x.shape[0], gated, save, on)
        if save:
            ctx.save_for_backward(x, w_up, w_down, h)
            ctx.grouping, ctx.on = grouping, on
        return _zero_tail(launch.rows(act, w_down, grouping, False, on), grouping)

    @staticmethod
    def backward(ctx: Any, *grads):
        x, w_up, w_down, h = ctx.saved_tensors
        grouping, on = ctx.grouping, ctx.on
        need_x, need_up, need_down = ctx.needs_input_grad[:3]
        grad = grads[0].contiguous()
        dh, act, _ = launch.activation_grad(grad, w_down, h, None, grouping, on)
        d_down = launch.weight_grad(act, grad, grouping, "", "down", on) if need_down else None
        del act
        d_up = launch.weight_grad(x, dh, grouping, "", "up", on) if need_up else None
        d_x = None
        if need_x:
            d_x = _zero_tail(launch.rows(dh, w_up, grouping, True, on), grouping)
        return d_x, d_up, d_down, None, None


def _zero_tail(rows: torch.Tensor, grouping: Grouping) -> torch.Tensor:
    outside = torch.arange(rows.shape[0], device=rows.device) >= grouping.offsets[-1]
    return rows.masked_fill_(outside[:, None], 0)


def moe_mlp(
    x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, w_up: torch.Tensor, w_down: torch.Tensor
) -> torch.Tensor:
    """Routed experts (T, D): sum over k of weights[t, k] * expert ids[t, k] of x[t]; ids outside 0..E-1 add nothing.

    w_up (E, D, 2F), gate columns first, is SwiGLU; (E, D, F) is exact GELU; w_down (E, F, D). Differentiable in x,
    weights, w_up, w_down; between forward and backward only x, the pre-activation (not for tokens of width 64 and
    128) and indices are kept.
    """
    if torch.compiler.is_compiling():
        from .compiled import routed_mlp

        return routed_mlp(x_TD.contiguous(), ids_TK, weights_TK.contiguous(), w_up, w_down)[0]
    on = launch.card(x_TD.device)
    if small.fits(x_TD, w_up, w_down) and on.narrow:
        narrow = small.narrow_schedule(x_TD.shape[1], on.programs)
        routing = route_rows(ids_TK, w_up.shape[0], narrow.block_m)
        return small.SmallMlp.apply(x_TD.contiguous(), weights_TK.contiguous(), w_up, w_down, routing, narrow)
    routing = route_rows(ids_TK, w_up.shape[0], on.schedule.block_m)
    return MoeMlp.apply(x_TD.contiguous(), weights_TK.contiguous(), w_up, w_down, routing, on)


def sorted_mlp(x_ND: torch.Tensor, w_up: torch.Tensor, w_down: torch.Tensor, counts_G: torch.Tensor) -> torch.Tensor:
    """Experts on rows sorted by expert, counts[g] rows each, (N, D); rows after the last block give exact zeros."""
    on = launch.card(x_ND.device)
    grouping = group_rows(counts_G, x_ND.shape[0], on.schedule.block_m)
    return SortedMlp.apply(x_ND.contiguous(), w_up, w_down, grouping, on)
