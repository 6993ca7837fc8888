"""Experts lent for one call: what travels, in which order, and gradients that come home to the owner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from twinmoe.backends.reference import ops
from twinmoe.backends.reference.comm import Communicator, run_ranks
from twinmoe.backends.reference.tape import grad, variable
from twinmoe.moe_core.config import MoeConfig
from twinmoe.moe_core.plan import Plan
from twinmoe.moe_core.planners.least_loaded import LeastLoadedOptions, plan_least_loaded
from twinmoe.moe_core.planners.static import owners, slot_table
from twinmoe.moe_core.residency.borrowed import Borrowed, lends, loans, native_slots
from twinmoe.moe_core.residency.owned import Owned
from twinmoe.moe_core.transport.base import Exchange

WIDTH, HIDDEN, EXPERTS, RANKS = 3, 2, 4, 4
MOE = MoeConfig(num_experts=EXPERTS, top_k=1, expert_hidden_size=HIDDEN)
TABLE = slot_table(owners(EXPERTS, RANKS), RANKS)
SHAPES = {"w_up": (WIDTH, 2 * HIDDEN), "w_down": (HIDDEN, WIDTH)}


def planned(loads: list[int]) -> Plan:
    counts = np.zeros((RANKS, EXPERTS), np.int64)
    counts[0] = loads
    return plan_least_loaded(counts, TABLE, LeastLoadedOptions(lambda_=None, min_rows=1))


@dataclass(frozen=True)
class Seen:
    """One rank: outputs of its rows, gradients of its own expert, messages sent, products it made."""

    out: np.ndarray
    grads: list[np.ndarray]
    bytes_sent: list[int]
    products: int


def values(rank: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rank)
    return {name: rng.standard_normal((1, *shape)) for name, shape in SHAPES.items()}


def rows_of(plan: Plan, rank: int) -> np.ndarray:
    return np.random.default_rng(10 + rank).standard_normal((int(plan.rows_per_rank()[rank]), WIDTH))


def run(plan: Plan, forward_only: bool = False) -> list[Seen]:
    def body(comm: Communicator) -> Seen:
        made = [0]

        class Counted:
            def __getattr__(self, name: str) -> Any:
                return getattr(ops, name)

            def expert_mlp(self, *arguments: Any) -> Any:
                made[0] += 1
                return ops.expert_mlp(*arguments)

        group = comm.group("expert_weights", [list(range(RANKS))])
        counted: Any = Counted()
        residency = Borrowed(Owned(counted, MOE, WIDTH, TABLE[comm.rank], 0, 0.1), counted, comm, group, MOE, WIDTH)
        params = {name: variable(value) for name, value in values(comm.rank).items()}
        rows = rows_of(plan, comm.rank)
        counts = ops.asarray(plan.rows_per_slot(comm.rank))
        out = residency.compute(residency.gather(params, plan), ops.asarray(rows), Exchange(counts, counts), plan)
        found = [] if forward_only else grad(out, list(params.values()), np.ones(out.shape))
        return Seen(ops.to_numpy(out), found, [call.bytes_sent for call in comm.log], made[0])

    return run_ranks(RANKS, body)


def expected(plan: Plan) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Outputs by rank and gradients by owner, expert by expert, without lending anything."""
    outs: list[list[np.ndarray]] = [[] for _ in range(RANKS)]
    grads = [[np.zeros((1, *shape)) for shape in SHAPES.values()] for _ in range(RANKS)]
    for rank in range(RANKS):
        rows = np.split(rows_of(plan, rank), np.cumsum(plan.rows_per_slot(rank))[:-1])
        for expert, block in zip(plan.slots[rank], rows, strict=True):
            if not len(block):
                continue
            params = [variable(value) for value in values(int(expert)).values()]
            counts = ops.asarray(np.array([len(block)]))
            out = ops.expert_mlp(ops.asarray(block), params[0], params[1], counts, "swiglu")
            outs[rank].append(ops.to_numpy(out))
            for total, part in zip(grads[int(expert)], grad(out, params, np.ones(out.shape)), strict=True):
                total += part
    return [np.concatenate(out) for out in outs], grads


@pytest.mark.parametrize(("loads", "products"), [([90, 5, 3, 2], 1), ([12, 0, 0, 0], 2), ([4, 4, 4, 4], 1)])
def test_outputs_are_those_of_the_experts_and_gradients_come_home(loads: list[int], products: int) -> None:
    """Many rows: one product over joined stacks; few: native rows first, by themselves."""
    plan = planned(loads)
    outs, grads = expected(plan)
    for rank, seen in enumerate(run(plan)):
        np.testing.assert_allclose(seen.out, outs[rank], rtol=0, atol=1e-13)
        for got, want in zip(seen.grads, grads[rank], strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
        assert seen.products == products


def test_one_flat_message_per_loan_and_one_gradient_back() -> None:
    expert = 8 * sum(int(np.prod(shape)) for shape in SHAPES.values())
    seen = run(planned([90, 5, 3, 2]))
    assert [s.bytes_sent for s in seen] == [[3 * expert, 0], *[[0, expert]] * 3]


def test_nothing_travels_where_nobody_lends() -> None:
    plan = planned([4, 4, 4, 4])
    assert not lends(plan)
    assert [s.bytes_sent for s in run(plan)] == [[]] * RANKS


def test_forward_only_sends_weights_and_nothing_back() -> None:
    expert = 8 * sum(int(np.prod(shape)) for shape in SHAPES.values())
    assert [s.bytes_sent for s in run(planned([90, 5, 3, 2]), forward_only=True)] == [[3 * expert], [0], [0], [0]]


def test_loans_are_the_same_on_both_sides_and_arrive_by_owner() -> None:
    counts = np.zeros((RANKS, 8), np.int64)
    counts[0] = [40, 40, 5, 5, 3, 3, 2, 2]
    table = slot_table(owners(8, RANKS), RANKS)
    plan = plan_least_loaded(counts, table, LeastLoadedOptions(lambda_=None, min_rows=1))
    sides = [loans(plan, rank) for rank in range(RANKS)]
    sent = np.array([side[0] for side in sides])
    received = np.array([side[1] for side in sides])
    np.testing.assert_array_equal(sent, received.T)
    assert sent.tolist() == [[0, 1, 1, 1], [0] * 4, [0] * 4, [0] * 4]
    assert sides[0][2].tolist() == [1, 0, 0]  # rows of the owner's stack: expert 1 to rank 1, expert 0 to ranks 2 and 3
    assert [native_slots(plan, rank) for rank in range(RANKS)] == [3, 2, 2, 2]


def test_borrowed_experts_of_several_owners_are_put_into_slot_order() -> None:
    slots = np.array([[0, -1, -1], [1, -1, -1], [2, 0, 1], [3, -1, -1]])
    weight_from = np.full((4, 3), -1)
    weight_from[2, 1:] = [0, 1]
    plan = Plan(slots, weight_from, (), np.zeros((4, 12), np.int64), np.zeros(12, np.int64))
    assert loans(plan, 2)[3] is None
    slots[2, 1:], weight_from[2, 1:] = [1, 0], [1, 0]
    order = loans(plan, 2)[3]
    assert order is not None
    assert order.tolist() == [1, 0]
