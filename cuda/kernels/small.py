"""Routed experts of narrow tokens on `small_experts`: differentiable, saves x and indices only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from .gather_sum import gather_sum
from .grouping import Routing
from .ragged import ragged
from .small_experts import small_forward_kernel, small_token_grad_kernel, small_weight_grad_kernel


@dataclass(frozen=True)
class Narrow:
    """Tiles of one kernel: rows, hidden units, warps, stages, programs on a multiprocessor."""

    rows: int
    units: int
    warps: int
    stages: int
    per_sm: int = 2


@dataclass(frozen=True)
class NarrowSchedule:
    """Tiles of the three kernels, and multiprocessors."""

    forward: Narrow
    token: Narrow
    weight: Narrow
    programs: int

    @property
    def block_m(self) -> int:
        """Rows of a tile in the routing's table; the two kernels that walk it must agree."""
        return self.forward.rows


NARROW = {
    64: (Narrow(128, 64, 8, 2, 2), Narrow(128, 64, 8, 2, 1), Narrow(64, 64, 4, 2)),
    128: (Narrow(128, 64, 8, 2, 1), Narrow(128, 64, 8, 2, 1), Narrow(64, 32, 4, 2)),
}
"""By width: forward, token gradient, weight gradient. At width 256 `MoeMlp` is faster."""


def narrow_schedule(width: int, programs: int) -> NarrowSchedule:
    """What a width of 64 or 128 runs with."""
    return NarrowSchedule(*NARROW[width], programs)


def fits(x: torch.Tensor, w_up: torch.Tensor, w_down: torch.Tensor) -> bool:
    """Whether `SmallMlp` takes these: width 64 or 128, hidden units by 64."""
    return x.shape[1] in NARROW and w_down.shape[1] % 64 == 0 and w_down.shape[1] > 0 and w_up.shape[0] > 0


class SmallMlp(torch.autograd.Function):
    """`MoeMlp` for narrow tokens."""

    @staticmethod
    def forward(ctx: Any, x, weights, w_up, w_down, routing: Routing, on: NarrowSchedule):
        out = x.new_empty((routing.position.numel(), x.shape[1]))
        tile, f = on.forward, w_down.shape[1]
        small_forward_kernel[(on.programs * tile.per_sm,)](
            x, routing.copies, *_weights(w_up, w_down, tile), ragged(out, [tile.rows, x.shape[1]]),
            routing.grouping.tiles, routing.grouping.num_tiles, f, GRID=on.programs * tile.per_sm,
            **_constants(x, w_up, f, routing, tile),
        )  # fmt: skip
        ctx.save_for_backward(x, weights, w_up, w_down)
        ctx.routing, ctx.on = routing, on
        return gather_sum(out, routing.position, weights)

    @staticmethod
    def backward(ctx: Any, *grads):
        x, weights, w_up, w_down = ctx.saved_tensors
        grad = grads[0].contiguous()
        dx = d_weights = d_up = d_down = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            dx, d_weights = _token_grad(x, grad, weights, w_up, w_down, ctx.routing, ctx.on)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            d_up, d_down = _weight_grad(x, grad, weights, w_up, w_down, ctx.routing, ctx.on)
        return dx, d_weights, d_up, d_down, None, None


def _token_grad(x, grad, weights, w_up, w_down, routing: Routing, on: NarrowSchedule):
    rows = x.new_empty((routing.position.numel(), x.shape[1]))
    d_weights = torch.zeros(weights.shape, dtype=torch.float32, device=x.device)
    tile, f = on.token, w_down.shape[1]
    small_token_grad_kernel[(on.programs * tile.per_sm,)](
        x, grad, routing.copies, weights, *_weights(w_up, w_down, tile), ragged(rows, [tile.rows, x.shape[1]]),
        d_weights, routing.grouping.tiles, routing.grouping.num_tiles, f, GRID=on.programs * tile.per_sm,
        **_constants(x, w_up, f, routing, tile),
    )  # fmt: skip
    return gather_sum(rows, routing.position, None), d_weights.to(weights.dtype)


def _weight_grad(x, grad, weights, w_up, w_down, routing: Routing, on: NarrowSchedule):
    d_up, d_down = torch.empty_like(w_up), torch.empty_like(w_down)
    tile, f = on.weight, w_down.shape[1]
    constants = _constants(x, w_up, f, routing, tile)
    constants["BK"] = constants.pop("BM")
    small_weight_grad_kernel[(w_up.shape[0] * (f // tile.units),)](
        x, grad, routing.copies, weights, *_weights(w_up, w_down, tile), *_weights(d_up, d_down, tile),
        routing.grouping.longest_first, routing.grouping.offsets, f, **constants,
    )  # fmt: skip
    return d_up, d_down


def _weights(w_up: torch.Tensor, w_down: torch.Tensor, tile: Narrow) -> tuple[TensorDescriptor, TensorDescriptor]:
    width = w_up.shape[1]
    up, down = w_up.view(-1, w_up.shape[2]), w_down.view(-1, width)
    return (
        TensorDescriptor(up, list(up.shape), list(up.stride()), [width, tile.units]),
        TensorDescriptor(down, list(down.shape), list(down.stride()), [tile.units, width]),
    )


def _constants(x: torch.Tensor, w_up: torch.Tensor, f: int, routing: Routing, tile: Narrow) -> dict[str, Any]:
    return {
        "TOP_K": routing.position.shape[1], "GATED": w_up.shape[2] == 2 * f, "BM": tile.rows, "D": x.shape[1],
        "BF": tile.units, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
