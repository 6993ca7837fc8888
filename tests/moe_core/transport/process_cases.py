"""Layers over real collectives against the oracle: one transport a case, on four ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from twinmoe.backends.protocol import Launch
from twinmoe.backends.registry import Backend
from twinmoe.moe_core.build import make_runtime
from twinmoe.moe_core.config import MoeConfig, ParallelConfig
from twinmoe.moe_core.exactness import Case, check_case
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.planners.static import owners, plan_static, slot_table
from twinmoe.moe_core.routing.base import Routing
from twinmoe.moe_core.topology import Level, Topology
from twinmoe.moe_core.transport.flat import Flat
from twinmoe.moe_core.transport.hierarchical import HierarchicalDedup, Hierarchy, hierarchy_groups
from twinmoe.moe_core.verify import nominal_cluster

CASES: dict[str, tuple[dict[str, Any], int]] = {
    "two_levels": ({"transport": "hierarchical_dedup", "hierarchy_depth": 2}, 1),
    "one_level": ({"transport": "hierarchical_dedup", "hierarchy_depth": 1}, 1),
    "aggregated": ({"transport": "hierarchical_dedup", "deduplicate": False}, 1),
    "tensor": ({}, 2),
    "groupwise": ({"transport": "groupwise"}, 2),
    "swap": ({"transport": "hierarchical_dedup", "placement": "swap"}, 1),
}


def run(backend: Backend, launch: Launch, dtype: str, ranks_per_node: int) -> dict[str, Any]:
    """{case: [worst error, where, exact zeros]} of this rank."""
    comm = backend.comm.connect(replace(launch, local_size=ranks_per_node))
    moe = MoeConfig(num_experts=6, top_k=3, expert_hidden_size=6, aux_loss_coeff=0.02, num_shared_experts=1)
    found = {}
    for name, (parallel, tensor) in CASES.items():
        expert = launch.size // tensor
        for routing in ("random", "idle_rank"):
            case = Case(moe, ParallelConfig(**parallel), expert=expert, tensor=tensor, routing=routing, dtype=dtype)  # type: ignore[arg-type]
            mesh = Mesh.over(launch.size, expert, 1, tensor)
            runtime = make_runtime(backend.ops, comm, mesh, case.parallel, nominal_cluster(expert, tensor))
            report = check_case(case, backend, runtime)
            found[f"{name} {routing}"] = [report.worst, report.where, report.zeros_ok]
    comm.close()
    return found


def narrow_rows(backend: Backend, launch: Launch) -> dict[str, Any]:
    """bfloat16 rows with float32 weights, which travel apart: distance of outputs and gradients from flat's."""
    import torch

    ops, comm = backend.ops, backend.comm.connect(launch)
    mesh, topology = Mesh(expert=launch.size), Topology(launch.size, (Level("cluster", 1),))
    group = comm.group("expert", mesh.partition("expert"))
    hierarchy = Hierarchy(topology, hierarchy_groups(comm, mesh, topology), 1)
    ids = np.argsort(np.random.default_rng(launch.rank).random((40, 8)), axis=1)[:, :4]
    counts = comm.gather_to_host(np.bincount(ids.reshape(-1), minlength=8), group)
    plan = plan_static(counts, slot_table(owners(8, launch.size), launch.size))
    found = {}
    for name, transport in (
        ("flat", Flat(ops, comm, group)),
        ("dedup", HierarchicalDedup(ops, comm, group, hierarchy)),
    ):
        rng = np.random.default_rng(launch.rank)
        x = torch.tensor(rng.standard_normal((40, 16)), dtype=torch.bfloat16, requires_grad=True)
        weights = torch.tensor(rng.random((40, 4)), dtype=torch.float32, requires_grad=True)
        routing = Routing(ops.asarray(ids), ops.asarray(ids), weights, {})
        rows, exchange = transport.dispatch(x, routing, plan)
        y = transport.combine(rows, weights, exchange)
        y.backward(torch.ones_like(y))
        assert x.grad is not None
        assert weights.grad is not None
        found[name] = [y.detach().float(), x.grad.float(), weights.grad]
    comm.close()
    pairs = zip(found["flat"], found["dedup"], strict=True)
    return {"distances": [float((a - b).norm() / a.norm()) for a, b in pairs]}
