"""A rank that is gone without a word is noticed; one that runs, or ended in order, is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from twinmoe.moe_core.alive import alive, forget, lost_rank

WAITS = (
    "import sys, pathlib\nfrom twinmoe.moe_core.alive import alive\n"
    "with alive(pathlib.Path(sys.argv[1]), 3):\n    print('in', flush=True)\n    sys.stdin.read()\n"
)


def test_a_killed_process_is_lost_and_one_that_ends_is_not(tmp_path: Path) -> None:
    for kill in (True, False):
        with subprocess.Popen(
            [sys.executable, "-c", WAITS, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdout.readline()
            assert lost_rank(tmp_path) is None
            if kill:
                child.kill()
            else:
                child.stdin.close()
            child.wait(30)
        assert lost_rank(tmp_path) == (3 if kill else None)
        forget(tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_a_rank_that_fails_in_order_is_not_lost(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="as told"), alive(tmp_path, 0):
        raise RuntimeError("as told")
    assert lost_rank(tmp_path) is None
