"""One exchange with a linear expert per slot, on virtual ranks: values and every gradient, by transport."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from twinmoe.backends.reference import ops
from twinmoe.backends.reference.comm import Call, Communicator, run_ranks
from twinmoe.backends.reference.tape import grad, variable
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.plan import Plan
from twinmoe.moe_core.routing.base import Routing
from twinmoe.moe_core.topology import Level, Topology
from twinmoe.moe_core.transport.base import Exchange, Transport
from twinmoe.moe_core.transport.flat import Flat
from twinmoe.moe_core.transport.hierarchical import HierarchicalDedup, Hierarchy, hierarchy_groups

WIDTH = 6
MakeTransport = Callable[[Communicator], Transport]


@dataclass(frozen=True)
class Problem:
    """Tokens of every rank: ids_RTK (-1 = not computed) and a plan for them."""

    ids: list[np.ndarray]
    plan: Plan

    @property
    def ranks(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Outcome:
    """What one rank saw. grads: of x, the weights and the experts; log: collectives of the forward pass."""

    y: np.ndarray
    grads: list[np.ndarray]
    exchange: Exchange
    log: list[Call]


def counts_of(ids: list[np.ndarray], num_experts: int) -> np.ndarray:
    return np.stack([np.bincount(i[i >= 0], minlength=num_experts) for i in ids])


TABLE = np.array(
    [
        [[0, 1, 4, 5], [2, 4, 6, 7]],
        [[0, 2, 4, 7], [4, 5, 6, 7]],
        [[0, 1, 2, 3], [1, 4, 5, 6]],
        [[0, 3, 6, 7], [1, 2, 5, 6]],
    ]
)
"""Choices (R, T, K) among 8 experts on 4 ranks in the sheet's H1, H2, H6, H8 and H9."""


def random_ids(
    seed: int, ranks: int, num_experts: int, top_k: int, max_tokens: int = 9, drop: float = 0.1
) -> list[np.ndarray]:
    """Distinct experts per token; some copies dropped; one rank without tokens now and then."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(ranks):
        tokens = int(rng.integers(0, max_tokens + 1))
        ids = np.argsort(rng.random((tokens, num_experts)), axis=1)[:, :top_k]
        found.append(np.where(rng.random(ids.shape) < drop, -1, ids))
    return found


def hierarchical(topology: Topology, depth: int | None, deduplicate: bool = True, **more: Any) -> MakeTransport:
    def make(comm: Communicator) -> Transport:
        mesh = Mesh(expert=comm.size)
        groups = hierarchy_groups(comm, mesh, topology)
        hierarchy = Hierarchy(topology, groups, depth, deduplicate=deduplicate, **more)
        return HierarchicalDedup(ops, comm, comm.group("expert", mesh.partition("expert")), hierarchy)

    return make


def flat(comm: Communicator) -> Transport:
    return Flat(ops, comm, comm.group("expert", [list(range(comm.size))]))


def levels(*units: int) -> tuple[Level, ...]:
    return tuple(Level(f"level{i}", u) for i, u in enumerate(units))


def run(problem: Problem, make: MakeTransport, other_weights: bool = False) -> list[Outcome]:
    """Every expert multiplies by its own matrix; upstream gradients and weights are random."""
    plan, num_experts = problem.plan, len(problem.plan.order)
    matrices = np.random.default_rng(0).standard_normal((num_experts, WIDTH, WIDTH))

    def body(comm: Communicator) -> Outcome:
        rng = np.random.default_rng(100 + comm.rank)
        ids = problem.ids[comm.rank]
        x, weights = variable(rng.standard_normal((len(ids), WIDTH))), variable(rng.standard_normal(ids.shape))
        mine = plan.slots[comm.rank]
        stack = variable(np.where(mine[:, None, None] >= 0, matrices[np.maximum(mine, 0)], 0))
        transport = make(comm)
        start = len(comm.log)
        routing = Routing(ops.asarray(ids), ops.asarray(ids), weights, {})
        rows, exchange = transport.dispatch(x, routing, plan)
        out = ops.grouped_matmul(rows, stack, exchange.counts_C)
        y = transport.combine(out, weights * 2.0 if other_weights else weights, exchange)
        log = comm.log[start:]
        seen = grad(y, [x, weights, stack], rng.standard_normal(y.shape))
        return Outcome(ops.to_numpy(y), seen, exchange, log)

    return run_ranks(problem.ranks, body)


def expert_gradients(problem: Problem, outcomes: list[Outcome]) -> np.ndarray:
    """(E, D, D): summed over the slots that hold an expert."""
    total = np.zeros((len(problem.plan.order), WIDTH, WIDTH))
    for rank, outcome in enumerate(outcomes):
        for slot, expert in enumerate(problem.plan.slots[rank]):
            if expert >= 0:
                total[expert] += outcome.grads[2][slot]
    return total


def assert_same(problem: Problem, left: list[Outcome], right: list[Outcome], tolerance: float = 1e-10) -> None:
    close: dict[str, Any] = {"rtol": 0, "atol": tolerance}
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a.y, b.y, **close)
        np.testing.assert_allclose(a.grads[0], b.grads[0], **close)
        np.testing.assert_allclose(a.grads[1], b.grads[1], **close)
    np.testing.assert_allclose(expert_gradients(problem, left), expert_gradients(problem, right), **close)
