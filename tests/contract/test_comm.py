"""Every collective of every backend that loads, in real processes, against the reference's virtual ranks."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from twinmoe.backends import reference, registry
from twinmoe.backends.reference import comm as reference_comm
from twinmoe.testing.conftest import BACKENDS, load_or_skip
from twinmoe.testing.contract.adapters import TOLERANCES, Evaluation, adapter_of, assert_same
from twinmoe.testing.contract.comm_cases import DTYPES, SCENARIOS, run_all

JOB_SECONDS = 150
WORKER = Path(__file__).with_name("comm_worker.py")
Results = dict[str, "Evaluation | str"]


@lru_cache
def reference_results(size: int) -> list[Results]:
    """By rank."""
    return reference_comm.run_ranks(size, lambda comm: run_all(reference, comm, adapter_of("reference")))


@pytest.fixture(scope="module", params=BACKENDS)
def backend_name(request: pytest.FixtureRequest) -> str:
    load_or_skip(request.param)
    return request.param


@pytest.fixture(scope="module", params=[2, 4])
def job(backend_name: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """Results of one job of real processes, by rank."""
    devices = registry.probe(backend_name).devices
    if devices is not None and devices < request.param:
        pytest.skip(f"{request.param} ranks need as many devices, here are {devices}")
    return run_job(backend_name, request.param, tmp_path_factory.mktemp(f"{backend_name}-{request.param}"))


def run_job(name: str, size: int, folder: Path) -> list[Results]:
    port = free_port()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    logs = [(folder / f"{rank}.log").open("w") for rank in range(size)]
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), name, str(rank), str(size), str(port), str(folder)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        wait_for(workers)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        for log in logs:
            log.close()
    found = [folder / f"{rank}.pickle" for rank in range(size)]
    missing = [rank for rank, path in enumerate(found) if not path.exists()]
    texts = "\n".join((folder / f"{rank}.log").read_text()[-2000:] for rank in missing)
    assert not missing, f"ranks {missing} left no results:\n{texts}"
    return [pickle.loads(path.read_bytes()) for path in found]


def wait_for(workers: list[subprocess.Popen[bytes]]) -> None:
    """Until all have ended, one has failed, or the time is over."""
    deadline = time.monotonic() + JOB_SECONDS
    while time.monotonic() < deadline and any(w.poll() is None for w in workers):
        if any(w.poll() for w in workers):
            time.sleep(2)  # the others say why before they are killed
            return
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.processes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scenario", list(SCENARIOS))
def test_collective_equals_the_reference(job: list[Results], scenario: str, dtype: str) -> None:
    key = f"{scenario}-{dtype}"
    for rank, (found, right) in enumerate(zip(job, reference_results(len(job)), strict=True)):
        expected, got = right[key], found[key]
        assert not isinstance(expected, str), f"reference, rank {rank}: {expected}"
        assert not isinstance(got, str), f"rank {rank}: {got}"
        assert_same(got, expected, TOLERANCES[dtype])


def test_uneven_all_to_all_delivers_the_rows_of_the_field_report() -> None:
    results = [r["all_to_all_uneven-float64"] for r in reference_results(4)]
    rows = [r.values[0] for r in results if isinstance(r, Evaluation)]
    assert [r[:, 0].tolist() for r in rows] == [[200, 201, 202], [0, 1], [], [2, 300, 301, 302, 303]]
    assert rows[2].shape == (0, 2)
    assert sum(float(r[:, 0].sum()) for r in rows) == 1812
    back = [r["all_to_all_round_trip-float64"] for r in reference_results(4)]
    firsts = [r.values[0][:, 0].tolist() for r in back if isinstance(r, Evaluation)]
    assert firsts == [[0, 2, 8], [], [200, 201, 202], [1200, 1204, 1208, 1212]]


def test_reference_scenarios_have_adjoints_that_are_transposes() -> None:
    """<A x, s> = <x, A^T s> summed over ranks, for the collectives that are linear in x."""
    for size in (2, 4):
        for name in ("all_to_all_equal", "all_gather", "reduce_scatter", "all_reduce"):
            left = right = 0.0
            for rank, results in enumerate(reference_results(size)):
                r = results[f"{name}-float64"]
                assert isinstance(r, Evaluation)
                value, grad = r.values[0], r.grads[0]
                upstream = np.random.default_rng([rank, 0, *value.shape]).integers(-8, 9, value.shape) / 4.0
                x = np.random.default_rng([rank, *grad.shape]).normal(size=grad.shape).astype(np.float32)
                left, right = left + float((value * upstream).sum()), right + float((x * grad).sum())
            assert left == pytest.approx(right, rel=1e-12)
