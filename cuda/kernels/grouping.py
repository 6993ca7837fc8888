"""Which rows belong to which expert: sorted order, offsets and the table of row tiles, without host synchronisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from .sort_kernels import count_kernel, place_kernel, scan_kernel, table_kernel

_MOST_BINS = 1024
_BLOCK = 1024
_CHUNK = 16


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

    def parts(self) -> tuple[Grouping, torch.Tensor, int]:
        """(grouping, something in place of copies, 0): rows are in sorted order already."""
        return self, self.offsets, 0


@dataclass(frozen=True, eq=False)
class Routing:
    """copies (N,): flat (token, k) of each sorted row; position (T, K): sorted row of each copy, -1 = dropped."""

    grouping: Grouping
    copies: torch.Tensor
    position: torch.Tensor

    def parts(self) -> tuple[Grouping, torch.Tensor, int]:
        """(grouping, copies, copies per token)."""
        return self.grouping, self.copies, self.position.shape[1]


def group_rows(counts_E: torch.Tensor, num_rows: int, block_m: int) -> Grouping:
    """The tile table of num_rows >= sum(counts) rows that are already sorted."""
    num_experts = counts_E.numel()
    bins = triton.next_power_of_2(num_experts + 2)
    if bins > _MOST_BINS:
        return _table_by_torch(counts_E, num_rows, block_m)
    grouping = _empty(num_experts, num_rows, block_m, counts_E.device)
    table_kernel[(_chunks(grouping),)](counts_E, *_table(grouping), BINS=bins, BM=block_m, CHUNK=_CHUNK)
    return grouping


def route_rows(ids_TK: torch.Tensor, num_experts: int, block_m: int) -> Routing:
    """Sort copies by expert, (token, k) order within each; ids outside 0..E-1 are dropped."""
    ids = ids_TK.contiguous()
    bins = triton.next_power_of_2(num_experts + 2)
    blocks = triton.cdiv(ids.numel(), _BLOCK)
    if bins > _MOST_BINS or blocks > 8192 or not blocks:
        return _route_by_torch(ids, num_experts, block_m)
    grouping = _empty(num_experts, ids.numel(), block_m, ids.device)
    counts = torch.empty((blocks + 1, bins), dtype=torch.int32, device=ids.device)
    totals = counts[blocks]
    copies = torch.empty(ids.numel(), dtype=torch.int32, device=ids.device)
    position = torch.empty(ids.shape, dtype=torch.int32, device=ids.device)
    count_kernel[(blocks,)](ids, counts, ids.numel(), num_experts, BLOCK=_BLOCK, BINS=bins)
    height = triton.next_power_of_2(blocks)
    columns = max(1, min(bins, 4096 // height))
    scan_kernel[(bins // columns,)](counts, totals, blocks, BINS=bins, ROWS=height, COLUMNS=columns)
    place_kernel[(blocks + _chunks(grouping),)](
        ids, counts, totals, copies, position, *_table(grouping)[:4], ids.numel(), *_table(grouping)[4:], blocks,
        BLOCK=_BLOCK, BINS=bins, BM=block_m, CHUNK=_CHUNK,
    )  # fmt: skip
    return Routing(grouping, copies, position)


def _empty(num_experts: int, num_rows: int, block_m: int, device: torch.device) -> Grouping:
    most = num_rows // block_m + num_experts
    storage = torch.empty(2 * num_experts + 2 + 4 * most, dtype=torch.int32, device=device)
    tiles, offsets, longest, num = storage.split([4 * most, num_experts + 1, num_experts, 1])
    return Grouping(offsets, longest, tiles.view(most, 4), num)


def _chunks(grouping: Grouping) -> int:
    return triton.cdiv(max(grouping.tiles.shape[0], grouping.num_experts), _CHUNK)


def _table(g: Grouping) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
    return g.offsets, g.longest_first, g.tiles, g.num_tiles, g.num_experts, g.tiles.shape[0]


def _table_by_torch(counts_E: torch.Tensor, num_rows: int, block_m: int) -> Grouping:
    num_experts = counts_E.numel()
    counts = counts_E.to(torch.int32)
    offsets = torch.cat([counts.new_zeros(1), torch.cumsum(counts, 0, dtype=torch.int32)])
    tiles = (counts + (block_m - 1)) // block_m
    ends = torch.cumsum(tiles, 0, dtype=torch.int32)
    index = torch.arange(num_rows // block_m + num_experts, dtype=torch.int32, device=counts.device)
    expert = torch.searchsorted(ends, index, right=True).clamp_(max=num_experts - 1)
    first = offsets[expert] + (index - (ends - tiles)[expert]) * block_m
    table = torch.stack([expert.to(torch.int32), first, offsets[expert + 1], index], dim=1)
    longest_first = torch.argsort(counts, descending=True, stable=True).to(torch.int32)
    return Grouping(offsets, longest_first, table, ends[-1:])


def _route_by_torch(ids_TK: torch.Tensor, num_experts: int, block_m: int) -> Routing:
    ids = ids_TK.reshape(-1)
    kept = (ids >= 0) & (ids < num_experts)
    narrow = torch.int16 if num_experts < 2**15 else torch.int32  # half the passes of a radix sort
    keys, order = torch.sort(torch.where(kept, ids, num_experts).to(narrow), stable=True)
    bounds = torch.arange(num_experts + 1, dtype=narrow, device=keys.device)
    offsets = torch.searchsorted(keys, bounds, out_int32=True)
    row = torch.arange(ids.numel(), dtype=torch.int32, device=ids.device)
    position = torch.empty_like(row)
    position[order] = torch.where(row < offsets[-1], row, -1)
    grouping = _table_by_torch(offsets[1:] - offsets[:-1], ids.numel(), block_m)
    return Routing(grouping, order.to(torch.int32), position.reshape(ids_TK.shape))
