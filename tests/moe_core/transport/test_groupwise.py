"""groupwise computes what flat computes and sends a t-th of the bytes between groups (the sheet's P10)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmoe.backends.reference import ops
from twinmoe.backends.reference.comm import Call, Communicator, run_ranks
from twinmoe.backends.reference.tape import grad, variable
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.plan import Plan
from twinmoe.moe_core.planners.least_loaded import LeastLoadedOptions, plan_least_loaded
from twinmoe.moe_core.planners.static import owners, plan_static, slot_table
from twinmoe.moe_core.routing.base import Routing
from twinmoe.moe_core.tensor_parallel import SummedOverTensor, all_reduce_bytes
from twinmoe.moe_core.transport.flat import Flat
from twinmoe.moe_core.transport.groupwise import Groupwise, Slices
from twinmoe.testing.moe_core.transport.harness import counts_of, random_ids

WIDTH = 3


@dataclass(frozen=True)
class Outcome:
    """y, gradients of x and of the weights summed over the tensor group, of the experts over all; collectives."""

    y: np.ndarray
    grads: list[np.ndarray]
    log: list[Call]
    sent: int
    returned: int
    inside: tuple[int, int] | None


def run(kind: str, ids: list[np.ndarray], plan: Plan, tensor: int, padding: Any = "destination") -> list[Outcome]:
    """kind: 'flat' or 'groupwise' with experts whose parts sum to the whole, 'replicated' with whole experts."""
    mesh = Mesh(expert=len(ids), tensor=tensor)
    matrices = np.random.default_rng(0).standard_normal((len(plan.order), WIDTH, WIDTH))
    part = np.arange(1, tensor + 1) / (tensor * (tensor + 1) / 2)

    def body(comm: Communicator) -> Outcome:
        group = comm.group("expert", mesh.partition("expert"))
        inside = comm.group("tensor", mesh.partition("tensor"))
        rng = np.random.default_rng(100 + group.index)
        mine = ids[group.index]
        x, weights = variable(rng.standard_normal((len(mine), WIDTH))), variable(rng.standard_normal(mine.shape))
        slots = plan.slots[group.index]
        scale = 1.0 if kind == "replicated" else part[inside.index]
        stack = variable(np.where(slots[:, None, None] >= 0, scale * matrices[np.maximum(slots, 0)], 0))
        if kind == "flat":
            transport: Any = SummedOverTensor(Flat(ops, comm, group), ops, comm, inside)
        else:
            transport = Groupwise(ops, comm, group, inside, kind == "replicated", padding)
        start = len(comm.log)
        routing = Routing(ops.asarray(mine), ops.asarray(mine), weights, {})
        rows, exchange = transport.dispatch(x, routing, plan)
        y = transport.combine(ops.grouped_matmul(rows, stack, exchange.counts_C), weights, exchange)
        log = comm.log[start:]
        upstream = rng.standard_normal(y.shape) / tensor
        own = [comm.all_reduce(variable(g), inside).value for g in grad(y, [x, weights], upstream)]
        both = [np.zeros((1, 1))] * 2
        if exchange.traffic:
            both = [exchange.traffic[0].sent, exchange.traffic[0].returned]
        sent, returned = (int(t[group.index].sum() - t[group.index, group.index]) for t in both)
        return Outcome(ops.to_numpy(y), own, log, sent, returned, exchange.tensor_bytes)

    return run_ranks(mesh.size, body)


def static(ids: list[np.ndarray], num_experts: int) -> Plan:
    return plan_static(counts_of(ids, num_experts), slot_table(owners(num_experts, len(ids)), len(ids)))


def assert_same(left: list[Outcome], right: list[Outcome]) -> None:
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a.y, b.y, rtol=0, atol=1e-12)
        for one, other in zip(a.grads, b.grads, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


def test_p10_a_buffer_of_10_rows_per_expert():
    ids = [np.repeat(np.arange(4), 10)[:, None]] * 2  # 4 experts on 2 ranks, 10 rows each from either
    plan = static(ids, 4)
    plain = run("flat", ids, plan, 4)
    sliced = run("replicated", ids, plan, 4, "slot")
    for one, other in zip(plain, sliced, strict=True):
        between = [next(c.bytes_sent // 8 for c in o.log if c.name == "all_to_all") for o in (one, other)]
        assert between == [60, 18]
        gathered = [c.bytes_sent // 8 for c in other.log if c.name == "all_gather"]
        assert gathered[0] == 3 * 4 * 3 * 3  # 3 rows of 4 experts to 3 neighbours: 108 elements arrive likewise
    assert Slices(np.array([[10, 10, 10, 10]]), 4).slice_rows.tolist() == [[3, 3, 3, 3]]
    cheaper = run("replicated", ids, plan, 4)
    assert next(c.bytes_sent // 8 for c in cheaper[0].log if c.name == "all_to_all") == 15


def test_p10_bitwise_equal_to_the_plain_exchange_after_trimming():
    ids = random_ids(3, 2, 4, 2, max_tokens=11)
    plan = static(ids, 4)
    for padding in ("destination", "slot"):
        sliced = run("replicated", ids, plan, 4, padding)
        for r, outcome in enumerate(run("replicated", ids, plan, 1)):
            np.testing.assert_array_equal(outcome.y, sliced[4 * r].y)


@pytest.mark.parametrize("tensor", [2, 3])
@pytest.mark.parametrize("kind", ["groupwise", "replicated"])
@pytest.mark.parametrize("padding", ["destination", "slot"])
def test_values_and_gradients_are_those_of_flat(kind: str, tensor: int, padding: str):
    ids = random_ids(5, 3, 7, 2)
    plan = static(ids, 7)
    assert_same(run("flat", ids, plan, tensor), run(kind, ids, plan, tensor, padding))


def test_experts_with_several_slots():
    ids = [np.where(i == 3, 0, i) for i in random_ids(7, 4, 8, 2, max_tokens=12)]
    options = LeastLoadedOptions(min_rows=1, lambda_=None)
    plan = plan_least_loaded(counts_of(ids, 8), slot_table(owners(8, 4), 4), options)
    assert not plan.one_slot_per_expert
    assert_same(run("flat", ids, plan, 2), run("groupwise", ids, plan, 2))


@pytest.mark.parametrize("padding", ["destination", "slot"])
@pytest.mark.parametrize(("kind", "tensor"), [("groupwise", 2), ("groupwise", 3), ("replicated", 2), ("replicated", 3)])
def test_bytes_of_the_exchange_are_those_that_the_collectives_moved(kind: str, tensor: int, padding: str):
    ids = random_ids(8, 4, 8, 2)
    for outcome in run(kind, ids, static(ids, 8), tensor, padding):
        out, back = (c.bytes_sent for c in outcome.log if c.name == "all_to_all")
        assert (out, back) == (outcome.sent, outcome.returned)
        inside = [c.bytes_sent for c in outcome.log if c.name in ("all_gather", "reduce_scatter")]
        assert outcome.inside == (inside[0], sum(inside[1:]))
        assert len(inside) == (2 if kind == "replicated" else 3)
        assert sum(c.name == "gather_to_host" for c in outcome.log) == 0


def test_bytes_of_the_sum_over_the_tensor_group():
    ids = random_ids(8, 2, 8, 2)
    for outcome in run("flat", ids, static(ids, 8), 2):
        reduced = [c.bytes_sent for c in outcome.log if c.name == "all_reduce"]
        assert outcome.inside == (0, sum(reduced))  # with two ranks a ring sends what a direct exchange sends
    assert [all_reduce_bytes(12, t) for t in (1, 2, 3, 4)] == [0, 12, 16, 18]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(2, 2), (2, 4), (4, 2), (1, 2)]), st.integers(1, 3))
def test_any_routing(seed: int, shape: tuple[int, int], top_k: int):
    ranks, tensor = shape
    ids = random_ids(seed, ranks, 2 * ranks + 2, top_k, max_tokens=6, drop=0.2)
    plan = static(ids, 2 * ranks + 2)
    assert_same(run("flat", ids, plan, tensor), run("groupwise", ids, plan, tensor))
