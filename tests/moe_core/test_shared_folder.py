"""A run folder that nodes do not share is refused before a step is made."""

from __future__ import annotations

from pathlib import Path

import pytest
from twinmoe.backends.reference.comm import Communicator, run_ranks
from twinmoe.moe_core.combinations import ConfigError
from twinmoe.moe_core.shared_folder import check_shared


def check(size: int, folder_of: dict[int, Path]) -> None:
    def rank(comm: Communicator) -> None:
        world = comm.group("world", [list(range(size))])
        check_shared(comm, world, folder_of[comm.rank])

    run_ranks(size, rank)


def test_ranks_that_share_the_folder_leave_nothing_in_it(tmp_path: Path):
    check(4, dict.fromkeys(range(4), tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_rank_with_another_folder_is_named(tmp_path: Path):
    folders = {0: tmp_path / "a", 1: tmp_path / "a", 2: tmp_path / "b", 3: tmp_path / "c"}
    with pytest.raises(ConfigError, match="ranks 2, 3 do not see the run folder"):
        check(4, folders)
    assert list((tmp_path / "a").iterdir()) == []


def test_one_rank_needs_no_other(tmp_path: Path):
    check(1, {0: tmp_path / "absent"})
    assert not (tmp_path / "absent").exists()
