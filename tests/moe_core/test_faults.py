"""Bad steps, memory that runs out, ranks that wait: what is decided and what is said."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from twinmoe.backends.calls import CallLog
from twinmoe.backends.protocol import Group
from twinmoe.moe_core.faults import (
    FEWEST,
    MOST_IN_A_ROW,
    LossError,
    OutOfMemoryError,
    StepGuard,
    StuckError,
    at_place,
    errors_explained,
    is_out_of_memory,
    stalls_reported,
    terminations_noted,
)

BAD = [(math.nan, 1.0, 0.0), (math.inf, 1.0, 0.0), (1.0, math.nan, 0.0), (1.0, 1.0, 1.0)]


@pytest.mark.parametrize(("loss", "norm", "bad_norms"), BAD)
def test_a_bad_step_stops_the_run_or_is_skipped_and_counted(loss: float, norm: float, bad_norms: float) -> None:
    with pytest.raises(LossError, match="step 7: the loss is") as told:
        StepGuard().accepts(7, loss, norm, bad_norms)
    assert "train.on_nan=skip" in str(told.value)
    guard = StepGuard("skip")
    assert not guard.accepts(7, loss, norm, bad_norms)
    assert guard.accepts(8, 2.0, 1.0)
    assert (guard.skipped, guard.in_a_row) == (1, 0)


def test_an_exploding_loss_is_one_far_above_the_recent_median() -> None:
    guard = StepGuard("skip", factor=3.0)
    assert guard.accepts(1, 1e9, 1.0), "nothing to compare with yet"
    for step in range(2, 2 + FEWEST):
        assert guard.accepts(step, 2.0, 1.0)
    assert guard.accepts(9, 5.9, 1.0)
    assert not guard.accepts(10, 6.1, 1.0)
    assert guard.accepts(11, 2.0, 1.0), "a skipped loss is not among the recent"


def test_a_run_that_only_skips_stops() -> None:
    guard = StepGuard("skip")
    for step in range(1, MOST_IN_A_ROW):
        assert not guard.accepts(step, math.nan, 1.0)
    with pytest.raises(LossError, match="as in the 19 steps before"):
        guard.accepts(MOST_IN_A_ROW, math.nan, 1.0)


def test_a_guard_goes_on_where_it_was_saved() -> None:
    guard, again = StepGuard("skip", 3.0), StepGuard("skip", 3.0)
    for step, loss in enumerate([2.0, 2.1, math.nan, 2.2, math.nan]):
        guard.accepts(step, loss, 1.0)
    again.restore(json.loads(json.dumps(guard.as_json())))
    assert again == guard


# --- memory --------------------------------------------------------------------------------------
TELLS = [
    MemoryError("Unable to allocate 9 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    type("OutOfMemoryError", (RuntimeError,), {})("CUDA: tried to allocate 2 GiB"),
    RuntimeError("Device(id:0) memory isn't enough and alloc failed: Memory not enough"),
]


@pytest.mark.parametrize("error", TELLS, ids=lambda e: str(e)[:20])
def test_every_framework_tells_in_its_words(error: Exception) -> None:
    assert is_out_of_memory(error)


def test_other_errors_pass_as_they_are() -> None:
    assert not is_out_of_memory(ValueError("out of memory is only a word here"))
    with pytest.raises(KeyError), errors_explained(comm_of(0), 1, 8):
        raise KeyError("x")


def comm_of(rank: int, size: int = 2) -> Any:
    return SimpleNamespace(rank=rank, size=size, calls=CallLog(rank))


def test_memory_that_runs_out_names_rank_layer_rows_and_what_to_do() -> None:
    comm = comm_of(3)
    group = Group("expert", (0, 1, 2, 3), 3)

    def layer() -> None:
        with comm.calls.call("all_to_all", group, ((9, 4), (1, 2), (70, 30))):
            pass
        raise MemoryError("Unable to allocate 9 GiB")

    with pytest.raises(OutOfMemoryError) as told, errors_explained(comm, 12, 50):
        at_place(comm, "layers.5", layer)()
    for part in ("rank 3 ran out of memory in layers.5, step 12", "100 rows arrived here", "even routing gives it 50"):
        assert part in str(told.value)
    assert "parallel.max_rows_per_rank" in str(told.value)


# --- ranks that wait -------------------------------------------------------------------------------
def stuck(comm: Any, logs: Path, timeout_s: float) -> None:
    """A collective that its timeout ends."""
    with stalls_reported(comm, logs, timeout_s), comm.calls.call("all_to_all", Group("expert", (0, 1), 0), ((4, 2),)):
        time.sleep(0.9 * timeout_s)
        raise RuntimeError("timed out")


def test_a_stall_is_told_with_what_every_rank_was_doing(tmp_path: Path) -> None:
    (tmp_path / "rank_1.stalled.json").write_text(json.dumps({"time": 0, "told": "waits for 1 s in gather_to_host"}))
    comm = comm_of(0, size=3)
    comm.calls.place = "layers.1"
    with pytest.raises(StuckError) as told:
        stuck(comm, tmp_path, 1.0)
    lines = str(told.value).splitlines()
    assert lines[-3].startswith("  rank 0 waits for 1 s in all_to_all (call 1 of this rank) over expert, ranks 0, 1")
    assert "in layers.1" in lines[-3]
    assert lines[-2:] == [
        "  rank 1 waits for 1 s in gather_to_host",
        "  rank 2 said nothing: it is stopped, gone, or moved on",
    ]
    assert json.loads((tmp_path / "rank_0.stalled.json").read_text())["told"].startswith("waits")


def test_an_error_that_comes_at_once_is_no_stall(tmp_path: Path) -> None:
    comm = comm_of(0)
    with pytest.raises(ValueError, match="at once"), stalls_reported(comm, tmp_path, 60.0):
        raise ValueError("at once")


def test_a_full_disk_does_not_end_the_watch(tmp_path: Path) -> None:
    with pytest.raises(StuckError):
        stuck(comm_of(0), tmp_path / "not there", 1.0)


# --- being asked to end --------------------------------------------------------------------------
def test_sigterm_is_noted_inside_and_as_before_outside() -> None:
    before, noted = signal.getsignal(signal.SIGTERM), []
    with terminations_noted(lambda *_: noted.append(1)):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    assert noted == [1]
    assert signal.getsignal(signal.SIGTERM) is before
