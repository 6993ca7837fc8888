"""Host side of the expert kernels: descriptors, grids, output buffers. No autograd here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import Schedule, Tile, schedule_for
from .expert_backward import activation_grad_kernel, weight_grad_kernel
from .expert_forward import rows_kernel, up_kernel
from .grouping import Grouping, Routing
from .ragged import ragged

Weight = Literal["up", "down"]


@dataclass(frozen=True)
class Card:
    """A device as the launches see it. narrow: it has the shared memory that `small` asks for."""

    programs: int
    schedule: Schedule
    narrow: bool = False


@cache
def card(device: torch.device) -> Card:
    """Multiprocessors and schedule of a CUDA device."""
    major, minor = torch.cuda.get_device_capability(device)
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    return Card(programs, schedule_for(major * 10 + minor), narrow=major >= 9)


def up(
    x: torch.Tensor, w_up: torch.Tensor, routing: Routing | Grouping, num_rows: int, gated: bool, save: bool, on: Card
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(act (N, F), h (N, F or 2F) or None) of rows x[token] (Routing) or of sorted rows x (Grouping)."""
    ring = on.schedule.rings.up
    if ring:
        from . import launch_specialised as special

        if special.fits_up(x, w_up, gated):
            return special.up(x, w_up, routing, num_rows, save, ring, on.programs)
    grouping, copies, top_k = routing.parts()
    experts, width, hidden = w_up.shape
    parts = 2 if gated else 1
    f, tile = hidden // parts, on.schedule.up
    act = x.new_empty((num_rows, f))
    h = x.new_empty((num_rows, parts, f)) if save else None
    h_desc = ragged(act[:, None] if h is None else h, [tile.bm, 1, tile.bn // tile.pieces])
    _launch(
        up_kernel, tile, on, x, None if top_k else _box(x, tile.bm, tile.bk), copies,
        _box(w_up.view(experts * width, hidden), tile.bk, tile.bn), h_desc,
        ragged(act, [tile.bm, tile.bn // tile.pieces]), grouping.tiles, grouping.num_tiles,
        width, f, TOP_K=top_k, GATED=gated, SAVE=save, PIECES=tile.pieces,
    )  # fmt: skip
    return act, None if h is None else h.view(num_rows, hidden)


def rows(a: torch.Tensor, w: torch.Tensor, grouping: Grouping, transposed: bool, on: Card) -> torch.Tensor:
    """a @ w[e] (or its transpose) on each expert's rows: a (N, K) to (N, Dout). Rows of no expert stay unset."""
    experts, first, second = w.shape
    k, n = (second, first) if transposed else (first, second)
    ring = on.schedule.rings.dx if transposed else on.schedule.rings.down
    if ring:
        from . import launch_specialised as special

        if special.fits_rows(a, n):
            return special.rows(a, w, grouping, transposed, ring, on.programs)
    tile = on.schedule.dx if transposed else on.schedule.down
    out = a.new_empty((a.shape[0], n))
    box = (tile.bn, tile.bk) if transposed else (tile.bk, tile.bn)
    _launch(
        rows_kernel, tile, on, _box(a, tile.bm, tile.bk), _box(w.view(experts * first, second), *box),
        ragged(out, [tile.bm, tile.bn // tile.pieces]), grouping.tiles, grouping.num_tiles, k, n,
        TRANSPOSED=transposed, PIECES=tile.pieces,
    )  # fmt: skip
    return out


def activation_grad(
    grad: torch.Tensor, w_down: torch.Tensor, h: torch.Tensor, weights: torch.Tensor | None,
    routing: Routing | Grouping, on: Card,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """(dh like h, act (N, F) times its routing weight, gradient of the flat routing weights or None)."""
    ring = on.schedule.rings.act
    if ring:
        from . import launch_specialised as special

        if special.fits_act(h, w_down):
            return special.activation_grad(grad, w_down, h, weights, routing, ring, on.programs)
    grouping, copies, top_k = routing.parts()
    experts, f, width = w_down.shape
    num_rows, tile = h.shape[0], on.schedule.act
    parts = h.shape[1] // f
    dh, act = torch.empty_like(h), h.new_empty((num_rows, f))
    columns = -(-f // tile.bn)
    partial = torch.zeros((columns, num_rows), dtype=torch.float32, device=h.device) if top_k else h
    box = [tile.bm, 1, tile.bn // tile.pieces]
    _launch(
        activation_grad_kernel, tile, on, grad, None if top_k else _box(grad, tile.bm, tile.bk), copies,
        h if weights is None else weights, _box(w_down.view(experts * f, width), tile.bn, tile.bk),
        ragged(h.view(num_rows, parts, f), box),
        ragged(dh.view(num_rows, parts, f), box),
        ragged(act, [tile.bm, tile.bn // tile.pieces]), partial, grouping.tiles, grouping.num_tiles,
        width, f, num_rows, TOP_K=top_k, GATED=parts == 2, PIECES=tile.pieces,
    )  # fmt: skip
    return dh, act, partial.sum(0) if top_k else None


def weight_grad(
    a: torch.Tensor, b: torch.Tensor, routing: Routing | Grouping, gather: str, of: Weight, on: Card
) -> torch.Tensor:
    """(E, M, N): a^T @ b over each expert's rows; gather names the operand indexed by token: "a", "b" or ""."""
    ring = on.schedule.rings.dw_up if of == "up" else on.schedule.rings.dw_down
    if ring:
        from . import launch_specialised as special

        if special.fits_grad(a, b, gather):
            return special.weight_grad(a, b, routing, gather, ring, on.programs)
    grouping, copies, top_k = routing.parts()
    m, n = a.shape[1], b.shape[1]
    tile = on.schedule.dw_up if of == "up" else on.schedule.dw_down
    if not gather:
        tile = replace(tile, stages=(tile.stages + 1) // 2)  # an indexed load takes two stages a buffer
    out = a.new_empty((grouping.num_experts, m, n))
    _launch(
        weight_grad_kernel, tile, on, a, None if gather == "a" else ragged(a, [tile.bk, tile.bm]),
        b, None if gather == "b" else ragged(b, [tile.bk, tile.bn]), copies, out,
        grouping.longest_first, grouping.offsets, m, n, grouping.num_experts,
        TOP_K=top_k, GATHER_A=gather == "a", GATHER_B=gather == "b",
    )  # fmt: skip
    return out


def _box(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


def _launch(kernel: Any, tile: Tile, on: Card, *args: Any, **constants: Any) -> None:
    programs = on.programs * tile.per_sm
    kernel[(programs,)](
        *args, BM=tile.bm, BN=tile.bn, BK=tile.bk, GROUP=tile.group, GRID=programs, FLATTEN=tile.flatten,
        num_warps=tile.warps, num_stages=tile.stages, **constants,
    )  # fmt: skip
