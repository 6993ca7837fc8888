"""Routers that never write their scores: streaming top-k over tiles of experts, and its gradient, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TILE = 512
"""Experts whose scores exist at a time: torch.topk is several times faster from 64 (k + 1) columns on."""
ROWS = 1024
"""(row, head) pairs worked on at a time."""


def topk(scores_TE: Tensor, k: int) -> Tensor:
    scores = scores_TE.detach()
    if k == scores.shape[-1]:
        return _sorted(scores)
    best, ids = torch.topk(scores, k + 1, dim=-1)
    # torch.topk breaks ties arbitrarily and puts NaN first: a row with equal neighbours among its k + 1 best, or with
    # a NaN (then its best is one), is sorted stably instead
    odd = (~(best[:, 1:] < best[:, :-1])).any(-1)
    ids = ids[:, :k]
    exact = _sorted(scores[odd])[:, :k]
    return ids.index_put((odd.nonzero()[:, 0],), exact) if exact.shape[0] else ids.contiguous()


def _sorted(scores: Tensor) -> Tensor:
    """Ids by descending score, NaN as minus infinity, ties to the lower id."""
    clean = torch.nan_to_num(scores, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return torch.sort(clean, dim=-1, descending=True, stable=True).indices


def router_topk(
    x_NHD: Tensor, w_HDE: Tensor, bias_HE: Tensor | None, k: int, ids_NHK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if ids_NHK is None:
        ids_NHK = _choose(x_NHD.detach(), w_HDE.detach(), bias_HE, k)
    return _ChosenLogits.apply(x_NHD, w_HDE, ids_NHK), ids_NHK  # type: ignore[return-value]


def _choose(x: Tensor, w: Tensor, bias: Tensor | None, k: int) -> Tensor:
    ids = torch.empty((*x.shape[:2], k), dtype=torch.int64, device=x.device)
    wide = _wide(x, w)
    w = w.to(wide)
    for rows in _chunks(x):
        ids[rows] = _best(x[rows].transpose(0, 1).to(wide), w, bias, k).transpose(0, 1)
    return ids


class _ChosenLogits(torch.autograd.Function):
    """x . w of the chosen: taken from x and w, not from the scores that chose, so that a bias costs no digits and
    recomputation gives the same bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, ids)
        wide = _wide(x, w)
        w_rows = _by_expert(w.to(wide))
        return torch.cat([_logits(x[rows].to(wide), w_rows, ids[rows]) for rows in _chunks(x)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, w, ids = ctx.saved_tensors
        return *_gradients(x, w, ids, grads[0]), None


def _wide(x: Tensor, w: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, w.dtype), torch.float32)


def _chunks(x_NHD: Tensor) -> list[slice]:
    size = max(1, ROWS // max(1, x_NHD.shape[1]))
    return [slice(first, first + size) for first in range(0, max(1, x_NHD.shape[0]), size)]


def _best(x_HND: Tensor, w_HDE: Tensor, bias: Tensor | None, k: int) -> Tensor:
    """Ids (H, n, k) of the best: each tile's scores are merged with the best of the tiles before."""
    heads, rows, num = *x_HND.shape[:2], w_HDE.shape[2]
    best = x_HND.new_empty((heads, rows, 0))
    ids = torch.empty((heads, rows, 0), dtype=torch.int64, device=x_HND.device)
    for first in range(0, num, TILE):
        last = min(num, first + TILE)
        scores = torch.bmm(x_HND, w_HDE[:, :, first:last])
        scores = scores if bias is None else scores + bias[:, None, first:last].to(scores.dtype)
        # earlier tiles come first, so that equal scores keep the lower id
        merged = torch.cat([best, scores], -1)
        keep = topk(merged.flatten(0, 1), min(k, merged.shape[2])).unflatten(0, (heads, rows))
        best = torch.gather(merged, 2, keep)
        known = keep < ids.shape[2]
        earlier = torch.gather(ids, 2, torch.where(known, keep, 0)) if ids.shape[2] else keep
        ids = torch.where(known, earlier, keep - ids.shape[2] + first)
    return ids


def _by_expert(w_HDE: Tensor) -> Tensor:
    """(H * E, D): one row per head and expert."""
    return w_HDE.transpose(1, 2).flatten(0, 1)


def _rows_of(ids_NHK: Tensor, k: int, num_experts: int) -> Tensor:
    """(n * H,) rows of `_by_expert` that choice k names."""
    heads = torch.arange(ids_NHK.shape[1], device=ids_NHK.device)
    return (heads * num_experts + ids_NHK[:, :, k]).flatten()


def _logits(x_NHD: Tensor, w_rows: Tensor, ids_NHK: Tensor) -> Tensor:
    num = w_rows.shape[0] // x_NHD.shape[1]
    x = x_NHD.reshape(-1, x_NHD.shape[2])
    picked = [(x * w_rows.index_select(0, _rows_of(ids_NHK, k, num))).sum(-1) for k in range(ids_NHK.shape[2])]
    return torch.stack(picked, -1).unflatten(0, ids_NHK.shape[:2])


def _gradients(x: Tensor, w: Tensor, ids: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """dx = sum_k g_k w[:, id_k]; dw[:, id_k] += x g_k."""
    wide, (heads, width, num) = _wide(x, w), w.shape
    w_rows = _by_expert(w.to(wide)).contiguous()
    dw_rows = torch.zeros_like(w_rows)
    dx = torch.empty_like(x)
    for rows in _chunks(x):
        x_c, g_c = x[rows].to(wide).reshape(-1, width), g[rows].reshape(-1, g.shape[2], 1).to(wide)
        total = torch.zeros_like(x_c)
        for k in range(g.shape[2]):
            index = _rows_of(ids[rows], k, num)
            total.addcmul_(w_rows.index_select(0, index), g_c[:, k])
            if x.device.type == "cpu":
                dw_rows.index_add_(0, index, x_c * g_c[:, k])
        dx[rows] = total.reshape(x[rows].shape).to(x.dtype)
    dw = dw_rows.unflatten(0, (heads, num)).transpose(1, 2) if x.device.type == "cpu" else weight_gradient(x, w, ids, g)
    return dx, dw.to(w.dtype).contiguous()


def weight_gradient(x: Tensor, w: Tensor, ids: Tensor, g: Tensor) -> Tensor:
    """dw (H, D, E) by products with one tile of the (n, experts) gradient: without the atomics of an indexed sum."""
    wide = _wide(x, w)
    dw = torch.zeros(w.shape, dtype=wide, device=w.device)
    for rows in _chunks(x):
        x_HDN, g_c, ids_c = x[rows].to(wide).permute(1, 2, 0), g[rows].to(wide), ids[rows]
        for first in range(0, w.shape[2], TILE):
            experts = torch.arange(first, min(w.shape[2], first + TILE), device=w.device)
            tile = sum(torch.where(ids_c[:, :, k, None] == experts, g_c[:, :, k, None], 0.0) for k in range(g.shape[2]))
            dw[:, :, first : first + TILE] += torch.bmm(x_HDN, tile.transpose(0, 1))  # type: ignore[union-attr]
    return dw
