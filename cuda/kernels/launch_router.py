"""Host side of the router's warp-specialised kernel (Hopper, bfloat16): same results as `router`'s launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import triton
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .router_specialised import router_specialised

BM, BK = 128, 64


@dataclass(frozen=True)
class Rings:
    """Experts of a tile, depth of the rings of x and of w, parts in which a tile's scores are compared."""

    be: int
    x: int
    w: int
    pieces: int


FEW, FEW_SPLIT, MANY = Rings(128, 8, 4, 1), Rings(128, 4, 8, 1), Rings(256, 4, 4, 4)


def rings_for(experts: int, terms: int) -> Rings:
    """The schedule that was fastest for so many experts and terms of w."""
    few = FEW if terms == 1 else FEW_SPLIT
    return few if experts <= FEW.be else MANY


def choose(
    x: torch.Tensor, terms: torch.Tensor, bias: torch.Tensor | None, experts: int, k: int, programs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, ids) (N, H, k) of the k best of x @ (sum of terms) + bias."""
    ids = torch.empty((*x.shape[:2], k), dtype=torch.int64, device=x.device)
    return _launch(x, terms, bias, ids, experts, programs, given=False), ids


def look_up(x: torch.Tensor, terms: torch.Tensor, ids: torch.Tensor, experts: int, programs: int) -> torch.Tensor:
    """Logits of given ids: the bits that `choose` gives."""
    return _launch(x, terms, None, ids, experts, programs, given=True)


def _launch(x, terms, bias, ids, experts: int, programs: int, given: bool) -> torch.Tensor:
    rows, heads, width = x.shape
    k, rings, tiles = ids.shape[2], rings_for(experts, terms.shape[0]), triton.cdiv(rows, BM)
    logits = torch.empty(ids.shape, dtype=torch.float32, device=x.device)
    grid, kernel = min(programs, tiles * heads), cast(Any, router_specialised)
    kernel[(grid,)](
        _box(x.view(rows, heads * width), BM, BK), _box(terms.view(-1, terms.shape[-1]), BK, rings.be),
        logits if bias is None else bias.contiguous(), logits, ids, tiles, rows, heads, width, experts,
        K=k, SLOTS=8 if k <= 8 else 16, TERMS=terms.shape[0], BIASED=bias is not None, GIVEN=given,
        PIECES=rings.pieces, BM=BM, BE=rings.be, BK=BK, XS=rings.x, WS=rings.w, GRID=grid, num_warps=8, maxnreg=168,
    )  # fmt: skip
    return logits


def _box(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], NVMMASharedLayout(128, 16, 2))
