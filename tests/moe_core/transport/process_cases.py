"""Layers over real collectives against the oracle: one transport a case, on four ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from twinmoe.backends.calls import CallLog
from twinmoe.backends.protocol import Group, Launch
from twinmoe.backends.registry import Backend
from twinmoe.moe_core.build import LayerSpec, build_layer, make_runtime
from twinmoe.moe_core.config import MoeConfig, ParallelConfig
from twinmoe.moe_core.exactness import Case, check_case
from twinmoe.moe_core.layer import MoELayer
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.planners.static import owners, plan_static, slot_table
from twinmoe.moe_core.routing.base import Memo, Routing, Tokens
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


class Recorder(CallLog):
    """A log that keeps, by collective, the elements that this rank hands to others."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self.seen: dict[str, int] = {}

    def call(self, name: str, group: Group | None, sizes: tuple[Any, ...] = (), place: str | None = None) -> Any:
        if group is not None and sizes:
            self.seen[name] = self.seen.get(name, 0) + elements_sent(name, group, sizes)
        return super().call(name, group, sizes, place)


def elements_sent(name: str, group: Group, sizes: tuple[Any, ...]) -> int:
    """What a direct algorithm hands to other ranks; an all-reduce is a reduce-scatter and an all-gather."""
    shape, *splits = sizes
    whole, others = int(np.prod(shape)), group.size - 1
    if name == "all_to_all" and splits and splits[0] is not None:
        return (sum(splits[0]) - splits[0][group.index]) * int(np.prod(shape[1:]))
    return {"all_gather": whole * others, "all_reduce": 2 * whole * others // group.size}.get(
        name, whole * others // group.size
    )


def traffic(backend: Backend, launch: Launch) -> dict[str, Any]:
    """{case: [[bytes of the exchange, between ranks and inside the tensor group], [the same from the calls]]}."""
    comm = backend.comm.connect(launch)
    comm.calls = Recorder(launch.rank)  # type: ignore[attr-defined]
    moe = MoeConfig(num_experts=6, top_k=3, expert_hidden_size=6)
    found = {}
    for name, (parallel, tensor) in CASES.items():
        mesh = Mesh.over(launch.size, launch.size // tensor, 1, tensor)
        config = ParallelConfig(**parallel, tensor_parallel_size=tensor)
        runtime = make_runtime(backend.ops, comm, mesh, config, nominal_cluster(mesh.expert, tensor))
        parts = build_layer(moe, config, runtime, LayerSpec(8, ""))
        assert isinstance(parts.layer, MoELayer)
        ops, seed = backend.ops, launch.rank // tensor
        x_TD = ops.asarray(np.random.default_rng(seed).standard_normal((10, 8)))
        params = {p.name: ops.asarray(p.initial()) for p in parts.parameters}
        tokens = Tokens(sequences=1, total=float(10 * mesh.token_ranks))
        memo, layer = Memo(), parts.layer
        routing = layer.router.route(params, x_TD, tokens, memo)
        plan = layer.plan(routing, tokens, memo)
        comm.calls.seen.clear()  # type: ignore[attr-defined]
        rows_ND, exchange = layer.transport.dispatch(x_TD, routing, plan)
        layer.transport.combine(rows_ND, routing.weights_TK, exchange)
        index = runtime.groups["expert"].index
        planned = sum(t.sent[index].sum() + t.returned[index].sum() for t in exchange.traffic)
        planned -= sum(t.sent[index, index] + t.returned[index, index] for t in exchange.traffic)
        seen = comm.calls.seen  # type: ignore[attr-defined]
        inside = sum(8 * seen.get(n, 0) for n in ("all_gather", "reduce_scatter", "all_reduce"))
        found[name] = [
            [int(planned), sum(exchange.tensor_bytes or (0, 0))],
            [8 * seen.get("all_to_all", 0), inside],
        ]
    comm.close()
    return found
