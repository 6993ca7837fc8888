"""Counting sort and tile table in the interpreter, against torch's stable sort."""

from __future__ import annotations

import pytest
import torch
from twinmoe.cuda.kernels import grouping


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(700, 3, 13), (5, 2, 3), (1500, 2, 200), (64, 1, 1)])
def test_counting_sort_is_the_stable_sort(tokens: int, top_k: int, experts: int) -> None:
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=torch.Generator().manual_seed(0))
    ids[ids == 2] = 0
    got = grouping.route_rows(ids, experts, 16)
    want = grouping._route_by_torch(ids, experts, 16)
    tiles = int(want.grouping.num_tiles)
    assert int(got.grouping.num_tiles) == tiles
    assert torch.equal(got.copies, want.copies)
    assert torch.equal(got.position, want.position)
    assert torch.equal(got.grouping.offsets, want.grouping.offsets)
    assert torch.equal(got.grouping.longest_first, want.grouping.longest_first)
    assert torch.equal(got.grouping.tiles[:tiles, :3], want.grouping.tiles[:tiles, :3])


def test_tile_table_of_sorted_rows() -> None:
    got = grouping.group_rows(torch.tensor([5, 0, 32, 17]), 60, 16)
    assert got.offsets.tolist() == [0, 5, 5, 37, 54]
    assert got.longest_first.tolist() == [2, 3, 0, 1]
    assert got.tiles[: int(got.num_tiles), :3].tolist() == [
        [0, 0, 5], [2, 5, 37], [2, 21, 37], [3, 37, 54], [3, 53, 54],
    ]  # fmt: skip
