"""Tile table for more experts than the sort kernels take: torch, on any device."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from twinmoe.cuda.kernels import grouping


@pytest.mark.parametrize("experts", [1023, 1024, 16384])
def test_many_groups_partition_the_rows_into_tiles(experts: int) -> None:
    counts = torch.randint(0, 9, (experts,), generator=torch.Generator().manual_seed(1))
    counts[7] = 0
    rows = grouping.group_rows(counts, int(counts.sum()), 4)
    table = rows.tiles[: int(rows.num_tiles), :3]
    covered = torch.zeros(int(counts.sum()), dtype=torch.int64)
    for expert, first, end in table.tolist():
        assert rows.offsets[expert] <= first < end == rows.offsets[expert + 1]
        covered[first : min(first + 4, end)] += 1
    assert torch.equal(covered, torch.ones_like(covered))
    assert counts[rows.longest_first.long()].diff().max() <= 0


def test_dropped_copies_sort_to_the_end_and_have_no_position() -> None:
    ids = torch.tensor([[1, -1], [2000, 0], [1, 5]])
    routing = grouping.route_rows(ids, 1500, 4)
    assert routing.copies.tolist() == [3, 0, 4, 5, 1, 2]
    assert routing.position.tolist() == [[1, -1], [-1, 0], [2, 3]]
    assert routing.grouping.offsets[-1] == 4
