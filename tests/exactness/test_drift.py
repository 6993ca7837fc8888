"""LA-13 over time: layouts change while a layer trains, and nothing else does."""

from __future__ import annotations

import numpy as np
import pytest
from twinmoe.backends import reference
from twinmoe.backends.reference.comm import run_ranks
from twinmoe.testing.conftest import load_or_skip
from twinmoe.testing.exactness.drift import WAYS, Run, moved, train
from twinmoe.testing.processes import run_processes

RANKS = 4


@pytest.fixture(scope="module")
def static() -> list[Run]:
    return run_ranks(RANKS, lambda comm: train(reference, comm, "static"))


@pytest.mark.parametrize("way", [way for way in WAYS if way != "static"])
def test_losses_under_drift_equal_the_static_run_and_no_optimizer_state_moves(way: str, static: list[Run]) -> None:
    runs = run_ranks(RANKS, lambda comm: train(reference, comm, way))
    losses = np.array(static[0].losses)
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(runs[0].losses, losses, rtol=1e-9, atol=0)
    if way.startswith("laer"):
        assert len(runs[0].changed) >= 3
        assert all(run.changed == runs[0].changed for run in runs)
    assert moved(static, runs) <= 1e-9
    assert np.mean(runs[0].busiest) < np.mean(static[0].busiest)


@pytest.mark.processes
@pytest.mark.parametrize("backend", ["cpu", pytest.param("mindspore-cpu", marks=pytest.mark.slow)])
def test_the_same_on_real_processes(backend: str, static: list[Run]) -> None:
    load_or_skip(backend)
    found = run_processes(
        RANKS, "twinmoe.testing.exactness.drift:process", {"ways": ["static", "laer", "laer_borrowed"]}, backend
    )
    for way, run in found.items():
        np.testing.assert_allclose(run["losses"], static[0].losses, rtol=1e-9, atol=0, err_msg=way)
    assert len(found["laer"]["changed"]) >= 3
    assert found["laer"]["changed"] == found["laer_borrowed"]["changed"]
