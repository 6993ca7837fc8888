"""Which rows belong to which expert: sorted order, offsets and the table of row tiles, without host synchronisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Grouping:
    """Rows sorted by expert. All tensors are int32.

    offsets (E + 1,): expert e has rows offsets[e]..offsets[e + 1]; longest_first (E,): experts by falling row count.
    tiles (max_tiles, 4): (expert, first row, end of the expert's rows, unused), of which num_tiles (1,) are real.
    """

    offsets: torch.Tensor
    longest_first: torch.Tensor
    tiles: torch.Tensor
    num_tiles: torch.Tensor

    @property
    def num_experts(self) -> int:
        return self.offsets.numel() - 1

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.offsets, self.longest_first, self.tiles, self.num_tiles


@dataclass(frozen=True, eq=False)
class Routing:
    """copies (N,): flat (token, k) of each sorted row; position (T, K): sorted row of each copy, -1 = dropped."""

    grouping: Grouping
    copies: torch.Tensor
    position: torch.Tensor


def group_rows(offsets: torch.Tensor, num_rows: int, block_m: int) -> Grouping:
    """The tile table of rows that are already sorted; offsets (E + 1,) int32, num_rows >= offsets[E]."""
    num_experts = offsets.numel() - 1
    counts = offsets[1:] - offsets[:-1]
    tiles = (counts + (block_m - 1)) // block_m
    ends = torch.cumsum(tiles, 0, dtype=torch.int32)
    index = torch.arange(num_rows // block_m + num_experts, dtype=torch.int32, device=offsets.device)
    expert = torch.searchsorted(ends, index, right=True).clamp_(max=num_experts - 1)
    first = offsets[expert] + (index - (ends - tiles)[expert]) * block_m
    table = torch.stack([expert.to(torch.int32), first, offsets[expert + 1], index], dim=1)
    longest_first = torch.argsort(counts, descending=True, stable=True).to(torch.int32)
    return Grouping(offsets, longest_first, table, ends[-1:])


def route_rows(ids_TK: torch.Tensor, num_experts: int, block_m: int) -> Routing:
    """Sort copies by expert, (token, k) order within each; ids outside 0..E-1 are dropped."""
    tokens, top_k = ids_TK.shape
    ids = ids_TK.reshape(-1)
    kept = (ids >= 0) & (ids < num_experts)
    keys = torch.where(kept, ids, num_experts).to(torch.int16 if num_experts < 2**15 else torch.int32)
    keys, order = torch.sort(keys, stable=True)
    bounds = torch.arange(num_experts + 1, dtype=keys.dtype, device=keys.device)
    offsets = torch.searchsorted(keys, bounds, out_int32=True)
    row = torch.arange(tokens * top_k, dtype=torch.int32, device=ids.device)
    position = torch.empty_like(row)
    position[order] = torch.where(row < offsets[-1], row, -1)
    grouping = group_rows(offsets, tokens * top_k, block_m)
    return Routing(grouping, order.to(torch.int32), position.reshape(tokens, top_k))
