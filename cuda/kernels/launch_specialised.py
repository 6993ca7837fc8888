"""Host side of the warp-specialised kernels (Hopper, bfloat16, SwiGLU): same results as `launch`'s functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .config import Ring
from .grouping import Grouping, Routing
from .ragged import ragged_layout
from .specialised import rows_specialised, up_specialised
from .specialised_grad import act_specialised, weight_grad_specialised

BM, BN, BK = 128, 256, 64


def fits_up(x: torch.Tensor, w_up: torch.Tensor, gated: bool) -> bool:
    """Whether `up` takes these shapes."""
    return _half(x) and gated and w_up.shape[1] % BK == 0 and w_up.shape[2] % BN == 0


def fits_rows(a: torch.Tensor, width: int) -> bool:
    """Whether `rows` makes this width."""
    return _half(a) and a.shape[1] % BK == 0 and width % BN == 0


def fits_act(h: torch.Tensor, w_down: torch.Tensor) -> bool:
    """Whether `activation_grad` takes these shapes."""
    f, width = w_down.shape[1:]
    return _half(h) and h.shape[1] == 2 * f and f % BN == 0 and width % BK == 0


def fits_grad(a: torch.Tensor, b: torch.Tensor, gather: str) -> bool:
    """Whether `weight_grad` takes these shapes."""
    bm, bn = _grad_tile(gather)
    return _half(a) and a.shape[1] % bm == 0 and b.shape[1] % bn == 0


def _grad_tile(gather: str) -> tuple[int, int]:
    """The operand that is gathered, by copies of 16 bytes, is the narrow one."""
    return (BN, BM) if gather == "b" else (BM, BN)


def _half(x: torch.Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.shape[0] > 0


def up(
    x: torch.Tensor, w_up: torch.Tensor, routing: Routing | Grouping, num_rows: int, save: bool, ring: Ring,
    programs: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """(act (N, F), h (N, 2F) or None)."""
    grouping, copies, top_k = routing.parts()
    experts, width, hidden = w_up.shape
    act = x.new_empty((num_rows, hidden // 2))
    h = x.new_empty((num_rows, hidden)) if save else None
    store = [BM, BN // 8]
    _run(
        up_specialised, ring, programs, x, None if top_k else _box(x, BM, BK), copies,
        _box(w_up.view(experts * width, hidden), BK, BN // 2), _ragged(act if h is None else h, store),
        _ragged(act, store), grouping.tiles, grouping.num_tiles, width, hidden // 2,
        TOP_K=top_k, SAVE=save, HALF=BN // 2, BM=BM, BK=BK,
    )  # fmt: skip
    return act, h


def rows(
    a: torch.Tensor, w: torch.Tensor, grouping: Grouping, transposed: bool, ring: Ring, programs: int
) -> torch.Tensor:
    """a @ w[e] (or its transpose) on each expert's rows."""
    experts, first, second = w.shape
    k, n = (second, first) if transposed else (first, second)
    out = a.new_empty((a.shape[0], n))
    box = (BN, BK) if transposed else (BK, BN)
    _run(
        rows_specialised, ring, programs, _box(a, BM, BK), _box(w.view(experts * first, second), *box),
        _ragged(out, [BM, BN // 4]), grouping.tiles, grouping.num_tiles, k, n,
        TRANSPOSED=transposed, BM=BM, BK=BK, BN=BN,
    )  # fmt: skip
    return out


def activation_grad(
    grad: torch.Tensor, w_down: torch.Tensor, h: torch.Tensor, weights: torch.Tensor | None,
    routing: Routing | Grouping, ring: Ring, programs: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """(dh like h, act times its routing weight, gradient of the flat routing weights or None)."""
    grouping, copies, top_k = routing.parts()
    experts, f, width = w_down.shape
    num_rows = h.shape[0]
    dh, act = torch.empty_like(h), h.new_empty((num_rows, f))
    partial = torch.zeros((f // BN, num_rows), dtype=torch.float32, device=h.device) if top_k else h
    piece = [BM, BN // 8]
    _run(
        act_specialised, ring, programs, grad, None if top_k else _box(grad, BM, BK), copies,
        h if weights is None else weights, _box(w_down.view(experts * f, width), BN, BK),
        _ragged(h, piece), _ragged(dh, piece), _ragged(act, piece), partial, grouping.tiles, grouping.num_tiles,
        width, f, num_rows, TOP_K=top_k, SLOTS=ring.slots, BM=BM, BK=BK, BN=BN,
    )  # fmt: skip
    return dh, act, partial.sum(0) if top_k else None


def weight_grad(
    a: torch.Tensor, b: torch.Tensor, routing: Routing | Grouping, gather: str, ring: Ring, programs: int
) -> torch.Tensor:
    """(E, M, N): a^T @ b over each expert's rows; gather names the operand indexed by token: "a", "b" or ""."""
    grouping, copies, top_k = routing.parts()
    m, n = a.shape[1], b.shape[1]
    out = a.new_empty((grouping.num_experts, m, n))
    gather_a = gather != "b"
    gathered, other = (a, b) if gather_a else (b, a)
    bm, bn = _grad_tile(gather)
    _run(
        weight_grad_specialised, ring, programs, gathered, None if gather else _ragged(gathered, [BK, bm]),
        _ragged(other, [BK, bn if gather_a else bm]), copies, _box(out.view(-1, n), bm, bn // 4),
        grouping.longest_first, grouping.offsets, m, n, grouping.num_experts,
        GATHER_A=gather_a, TOP_K=top_k if gather else 0, BM=bm, BN=bn, BK=BK,
    )  # fmt: skip
    return out


def _layout(box: Sequence[int]) -> NVMMASharedLayout:
    return NVMMASharedLayout(min(128, 2 * box[-1]), 16, len(box))


def _box(x: torch.Tensor, rows_: int, columns: int) -> TensorDescriptor:
    box = [rows_, columns]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, _layout(box))


def _ragged(x: torch.Tensor, box: Sequence[int]) -> TensorDescriptor:
    shape, strides = ragged_layout(x)
    whole = [1, 1, *box]
    return TensorDescriptor(x, shape, strides, whole, _layout(whole))


def _run(kernel: Any, ring: Ring, programs: int, *args: Any, **constants: Any) -> None:
    kernel[(programs,)](
        *args, STAGES=ring.stages, OUTS=ring.outs, GROUP=ring.group, GRID=programs, num_warps=8, maxnreg=168,
        **constants,
    )  # fmt: skip
