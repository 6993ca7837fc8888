"""Head Parallel over real processes and collectives, against one process of the reference."""

from __future__ import annotations

from typing import Any

import pytest
from twinmoe.backends.protocol import Launch
from twinmoe.backends.registry import Backend
from twinmoe.moe_core.build import make_runtime
from twinmoe.moe_core.config import MoeConfig, ParallelConfig
from twinmoe.moe_core.exactness import Case, check_case
from twinmoe.moe_core.mesh import Mesh
from twinmoe.testing.conftest import load_or_skip
from twinmoe.testing.processes import run_processes

pytestmark = pytest.mark.processes

MOE = MoeConfig(
    num_heads=4, head_dim=3, num_experts=4, top_k=2, expert_hidden_size=6, activation="gelu", aux_loss_coeff=0.02
)


def check(backend: Backend, launch: Launch, layouts: list[list[int]]) -> dict[str, Any]:
    """Worst relative error of outputs, gradients, norm, parameters over three steps, by (head, expert, chunks)."""
    comm = backend.comm.connect(launch)
    found = {}
    for head, expert, chunks in layouts:
        runtime = make_runtime(backend.ops, comm, Mesh.over(comm.size, expert, head))
        for routing in ("random", "padding_tail", "ties"):
            parallel = ParallelConfig.model_validate({"head_chunks": chunks})
            case = Case(MOE, parallel, expert, head, routing=routing, recompute=routing == "ties")
            report = check_case(case, backend, runtime)
            found[f"{head}x{expert} {chunks} {routing}"] = report.worst if report.zeros_ok else 1.0
    return found


@pytest.mark.parametrize(
    ("backend", "size", "layouts"),
    [
        ("cpu", 2, [[2, 1, 1], [2, 1, 2], [1, 1, 1]]),
        ("cpu", 4, [[4, 1, 1], [4, 1, 2], [2, 2, 1]]),
        ("mindspore-cpu", 2, [[2, 1, 1], [2, 1, 2]]),
    ],
)
def test_processes_equal_one_process(backend: str, size: int, layouts: list[list[int]]) -> None:
    load_or_skip(backend)
    found = run_processes(size, "twinmoe.testing.moe_core.test_heads_processes:check", {"layouts": layouts}, backend)
    assert len(found) == 3 * len(layouts)
    assert max(found.values()) < 1e-10, found
