"""The routed layer as an operation that `torch.compile` takes whole, and its gradients as another.

Tokens of every width go the way of `MoeMlp`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import launch
from .experts import routed_gradients, routed_outputs
from .grouping import Grouping, Routing, route_rows


@torch.library.custom_op("twinmoe::routed_mlp", mutates_args=())
def routed_mlp(
    x: Tensor, ids: Tensor, weights: Tensor, w_up: Tensor, w_down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, pre-activation, copies, position, table) of `experts.moe_mlp`; table: the grouping's arrays in one."""
    on = launch.card(x.device)
    routing = route_rows(ids, w_up.shape[0], on.schedule.block_m)
    y, h = routed_outputs(x, weights, w_up, w_down, routing, True, on)
    assert h is not None
    grouping = routing.grouping
    parts = (grouping.tiles.reshape(-1), grouping.offsets, grouping.longest_first, grouping.num_tiles)
    return y, h, routing.copies, routing.position, torch.cat(parts)


@routed_mlp.register_fake
def _(x: Tensor, ids: Tensor, weights: Tensor, w_up: Tensor, w_down: Tensor):
    rows, experts = ids.shape[0] * ids.shape[1], w_up.shape[0]
    most = rows // launch.card(x.device).schedule.block_m + experts
    h = x.new_empty((rows, w_up.shape[2]))
    table = ids.new_empty((4 * most + 2 * experts + 2,), dtype=torch.int32)
    return torch.empty_like(x), h, ids.new_empty((rows,), dtype=torch.int32), ids.to(torch.int32), table


@torch.library.custom_op("twinmoe::routed_mlp_backward", mutates_args=())
def routed_mlp_backward(
    grad: Tensor, x: Tensor, weights: Tensor, w_up: Tensor, w_down: Tensor, h: Tensor, copies: Tensor, position: Tensor,
    table: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weights, w_up, w_down."""
    on, experts = launch.card(x.device), w_up.shape[0]
    sizes = [table.numel() - 2 * experts - 2, experts + 1, experts, 1]
    tiles, offsets, longest, num = table.split(sizes)
    routing = Routing(Grouping(offsets, longest, tiles.view(-1, 4), num), copies, position)
    found = routed_gradients(grad, x, weights, w_up, w_down, h, routing, (True, True, True, True), on)
    assert all(g is not None for g in found)
    return found  # type: ignore[return-value]


@routed_mlp_backward.register_fake
def _(grad, x, weights, w_up, w_down, h, copies, position, table):
    return tuple(torch.empty_like(t) for t in (x, weights, w_up, w_down))


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    x, _, weights, w_up, w_down = inputs
    ctx.save_for_backward(x, weights, w_up, w_down, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    dx, d_weights, d_up, d_down = routed_mlp_backward(grad.contiguous(), *ctx.saved_tensors)
    return dx, None, d_weights, d_up, d_down


routed_mlp.register_autograd(_backward, setup_context=_keep)
