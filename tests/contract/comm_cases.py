"""All scenarios of a job, run in one order on every rank."""

from __future__ import annotations

import traceback
from typing import Any

from twinmoe.backends.protocol import Communicator
from twinmoe.testing.contract import collective_cases, trainer_cases
from twinmoe.testing.contract.adapters import Adapter, Evaluation
from twinmoe.testing.contract.job import Job

DTYPES = ("float64", "float32")
SCENARIOS = {**collective_cases.SCENARIOS, **trainer_cases.SCENARIOS}


def run_all(backend: Any, comm: Communicator, adapter: Adapter) -> dict[str, Evaluation | str]:
    """Every scenario in both precisions, in one order on all ranks. backend: has `ops` and `trainer`.

    After a failure the ranks are out of step: its text takes the place of its result and of all later ones.
    """
    world = comm.group("world", [list(range(comm.size))])
    results: dict[str, Evaluation | str] = {}
    failure: str | None = None
    for dtype in DTYPES:
        for name, scenario in SCENARIOS.items():
            if failure is None:
                try:
                    results[f"{name}-{dtype}"] = scenario(
                        Job(backend.ops, backend.trainer, comm, adapter, world, dtype)
                    )
                    continue
                except Exception:
                    failure = f"{name}-{dtype} failed:\n{traceback.format_exc()}"
            results[f"{name}-{dtype}"] = failure
    return results
