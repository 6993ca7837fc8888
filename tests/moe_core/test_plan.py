"""Laws of a Plan: what `check` refuses, runs and destinations, per-rank sums."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmoe.moe_core.plan import DROPPED, RESIDENT, Plan, destinations, runs
from twinmoe.moe_core.planners.least_loaded import LeastLoadedOptions, plan_least_loaded
from twinmoe.moe_core.planners.static import owners, plan_static, slot_table


def two_slot_plan() -> Plan:
    """Two ranks, one expert with a slot on each, source 0 sending 2 + 1 rows and source 1 sending 1 + 2."""
    return Plan(
        slots=np.array([[0], [0]]),
        weight_from=np.array([[RESIDENT], [0]]),
        order=(np.array([1, 0]),),
        flow=np.array([[2, 1], [1, 2]]),
        round=np.zeros(2, np.int64),
    )


def test_sums_per_rank_and_slot():
    plan = two_slot_plan()
    plan.check(np.array([[3], [3]]))
    assert (plan.ranks, plan.slots_per_rank, plan.one_slot_per_expert) == (2, 1, False)
    assert plan.rows_per_rank().tolist() == [3, 3]
    assert plan.send_matrix().tolist() == [[2, 1], [1, 2]]
    assert plan.rows_per_slot(1).tolist() == [3]


def test_rows_are_cut_into_runs_along_the_order():
    plan = two_slot_plan()
    slots, rows = runs(plan, 0)
    assert slots.tolist() == [1, 0]
    assert rows.tolist() == [1, 2]
    assert destinations(plan, 0, np.array([0, -1, 0, 0])).tolist() == [1, DROPPED, 0, 0]


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        ([[2, 0], [1, 2]], "Arrays are not equal"),
        ([[4, -1], [1, 2]], None),
    ],
)
def test_check_refuses_lost_and_negative_rows(flow, message):
    good = two_slot_plan()
    bad = Plan(good.slots, good.weight_from, good.order, np.array(flow), good.round)
    with pytest.raises(AssertionError, match=message):
        bad.check(np.array([[3], [3]]))


def test_check_refuses_slots_of_other_experts_repeats_and_rows_in_empty_slots():
    good, counts = two_slot_plan(), np.array([[3], [3]])
    other = Plan(np.array([[0], [1]]), good.weight_from, good.order, good.flow, good.round)
    with pytest.raises(AssertionError, match="another expert"):
        other.check(counts)
    twice = Plan(good.slots, good.weight_from, (np.array([0, 0]),), good.flow, good.round)
    with pytest.raises(AssertionError):
        twice.check(counts)
    empty = Plan(np.array([[0], [-1]]), good.weight_from, good.order, good.flow, good.round)
    with pytest.raises(AssertionError, match="empty slot"):
        empty.check(counts)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 12), st.booleans())
def test_destinations_deliver_the_flow(seed, ranks, num_experts, spilled):
    rng = np.random.default_rng(seed)
    ids = [rng.integers(-1, num_experts, rng.integers(0, 30)) for _ in range(ranks)]
    counts = np.stack([np.bincount(i[i >= 0], minlength=num_experts) for i in ids])
    table = slot_table(owners(num_experts, ranks), ranks)
    options = LeastLoadedOptions(lambda_=None, min_rows=1)
    plan = plan_least_loaded(counts, table, options) if spilled else plan_static(counts, table)
    plan.check(counts)
    for source in range(ranks):
        dest = destinations(plan, source, ids[source])
        kept = dest[dest >= 0]
        assert ((dest == DROPPED) == (ids[source] < 0)).all()
        assert (plan.slots.reshape(-1)[kept] == ids[source][ids[source] >= 0]).all()
        np.testing.assert_array_equal(np.bincount(kept, minlength=plan.slots.size), plan.flow[source])
