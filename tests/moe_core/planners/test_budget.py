"""Row budgets: rounds, the error, and forecasts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmoe.moe_core.plan import SHARDS, Plan, destinations
from twinmoe.moe_core.planners.budget import (
    LayerShape,
    RoundRule,
    RowBudgetError,
    forecast,
    round_plan,
    split_rounds,
    weight_slots,
)
from twinmoe.moe_core.planners.layout import tiled_layout
from twinmoe.moe_core.planners.least_loaded import LeastLoadedOptions, plan_least_loaded
from twinmoe.moe_core.planners.relayout import RelayoutOptions, plan_relayout
from twinmoe.moe_core.planners.static import owners, plan_static, slot_table

SHAPE = LayerShape(num_experts=4, hidden_size=10, expert_hidden_size=7, top_k=1, bytes_per_element=2)


def static(counts: np.ndarray) -> Plan:
    ranks, num_experts = counts.shape
    return plan_static(counts, slot_table(owners(num_experts, ranks), ranks))


def test_a_rank_over_its_budget_works_in_rounds_and_cuts_slots():
    counts = np.array([[4, 3], [1, 2]])
    counts = np.hstack([counts, [[1, 0], [0, 1]]])
    plan = split_rounds(static(counts), 4)
    plan.check(counts)
    assert plan.slots.tolist() == [[0, 1, 0, 1], [2, 3, -1, -1]]
    assert plan.round.tolist() == [0, 1, 1, 2, 0, 0, 0, 0]
    assert plan.flow.tolist() == [[4, 3, 0, 0, 1, 0, 0, 0], [0, 0, 1, 2, 0, 1, 0, 0]]
    assert [o.tolist() for o in plan.order] == [[0, 2], [1, 3], [4], [5]]
    assert weight_slots(plan)[0].tolist() == [0, 1, 0, 1]


def test_a_plan_within_the_budget_is_left_alone():
    plan = static(np.ones((2, 2), np.int64))
    assert split_rounds(plan, 2) is plan
    assert RoundRule().apply(plan) is plan
    assert RoundRule(2, "error").apply(plan) is plan


def test_over_budget_the_error_names_rank_expert_and_remedy():
    plan = static(np.array([[0, 0, 9, 1], [0, 0, 8, 0]]))
    with pytest.raises(RowBudgetError, match=r"rank 1 would compute 18 rows, 17 of them of expert 2.*least_loaded"):
        RoundRule(10, "error").apply(plan)
    with pytest.raises(RowBudgetError, match=r"18 rows \(\S+ GiB with its weights\)"):
        RoundRule(10, "error", shape=SHAPE).apply(plan)
    assert RoundRule(10).apply(plan).rounds == 2
    with pytest.raises(ValueError, match="at least 1"):
        split_rounds(plan, 0)


def test_overlapping_rounds_share_the_rows_of_the_busiest_rank():
    plan = static(np.array([[3, 0, 1, 0], [4, 0, 0, 2]]))
    split = RoundRule(chunks=3).apply(plan)
    assert split.rounds == 3
    assert [int(round_plan(split, n).rows_per_rank().max()) for n in range(3)] == [3, 3, 1]
    assert RoundRule(chunks=3).apply(static(np.zeros((2, 2), np.int64))).rounds == 1
    over = RoundRule(max_rows=5, chunks=4)
    assert over.exceeded(plan)
    assert over.apply(plan).rounds == 2


@st.composite
def plans(draw: st.DrawFn) -> tuple[np.ndarray, Plan]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ranks, num_experts = draw(st.integers(1, 16)), draw(st.integers(1, 64))
    shares = rng.dirichlet(np.full(num_experts, draw(st.sampled_from([0.05, 1.0]))))
    counts = np.stack([rng.multinomial(n, shares) for n in rng.integers(0, 200, ranks)]).astype(np.int64)
    table = slot_table(owners(num_experts, ranks), ranks)
    kind = draw(st.sampled_from(["static", "least_loaded", "relayout"]))
    if kind == "static":
        return counts, plan_static(counts, table)
    if kind == "least_loaded":
        return counts, plan_least_loaded(counts, table, LeastLoadedOptions(lambda_=None, min_rows=5))
    options = RelayoutOptions(table.shape[1] + 1)
    return counts, plan_relayout(counts, tiled_layout(num_experts, ranks, options.slots_per_rank), options)


@settings(deadline=None, max_examples=100)
@given(plans(), st.integers(1, 60))
def test_no_round_exceeds_the_budget_and_nothing_else_changes(made, budget):
    counts, plan = made
    split = split_rounds(plan, budget)
    split.check(counts)
    rows = split.flow.sum(0)
    rounds = int(split.round.max()) + 1
    assert rounds == max(1, -(-int(plan.rows_per_rank().max()) // budget))
    parts = [round_plan(split, number) for number in range(rounds)]
    for part in parts:
        assert part.rows_per_rank().max() <= budget
        np.testing.assert_array_equal(part.slots, plan.slots)
        np.testing.assert_array_equal(part.weight_from, plan.weight_from)
        assert [order.tolist() for order in part.order] == [order.tolist() for order in plan.order]
    np.testing.assert_array_equal(sum(part.flow for part in parts), plan.flow)
    np.testing.assert_array_equal(split.send_matrix(), plan.send_matrix())
    assert split.slots_per_rank - plan.slots_per_rank <= max(0, rounds - 1)
    np.testing.assert_array_equal(split.slots[:, : plan.slots_per_rank], plan.slots)
    np.testing.assert_array_equal(split.weight_from[:, : plan.slots_per_rank], plan.weight_from)
    first = weight_slots(split)
    filled = rows.reshape(split.slots.shape) > 0
    assert (first[filled] < plan.slots_per_rank).all()
    np.testing.assert_array_equal(np.take_along_axis(split.weight_from, first, 1)[filled], split.weight_from[filled])
    for slots, order in zip(plan.order, split.order):
        per_rank = order // split.slots_per_rank
        assert [r for i, r in enumerate(per_rank) if not i or r != per_rank[i - 1]] == [
            r for i, r in enumerate(slots // plan.slots_per_rank) if not i or r != slots[i - 1] // plan.slots_per_rank
        ]


@settings(deadline=None, max_examples=40)
@given(plans(), st.integers(1, 30), st.integers(0, 2**32))
def test_the_rows_of_a_round_are_the_runs_of_its_slots(made, budget, seed):
    counts, plan = made
    split = split_rounds(plan, budget)
    rng = np.random.default_rng(seed)
    source = int(rng.integers(len(counts)))
    ids = rng.permutation(np.repeat(np.arange(counts.shape[1]), counts[source]))
    whole = destinations(split, source, ids)
    before = destinations(plan, source, ids)
    np.testing.assert_array_equal(whole // split.slots_per_rank, before // plan.slots_per_rank)
    for number in range(int(split.round.max()) + 1):
        here = split.round[whole] == number
        part = destinations(round_plan(split, number), source, np.where(here, ids, -1))
        np.testing.assert_array_equal(part, np.where(here, before, -1))


def test_forecast_of_a_static_plan():
    counts = np.array([[6, 0, 1, 0], [5, 0, 0, 2]])
    need = forecast(static(counts), SHAPE)
    assert need.rows.tolist() == [11, 3]
    assert need.rounds == 1
    assert need.sent.tolist() == [20, 100]
    assert need.received.tolist() == [100, 20]
    assert need.weights_received.tolist() == need.weights_sent.tolist() == [0, 0]
    expert, row = 3 * 10 * 7 * 2, (2 * 10 + 3 * 7) * 2
    assert need.peak.tolist() == [2 * expert + 11 * row, 2 * expert + 3 * row]
    bounded = forecast(static(counts), SHAPE, max_rows=4)
    assert bounded.rounds == 3
    assert bounded.peak.tolist() == [2 * expert + 4 * row, 2 * expert + 3 * row]


def test_forecast_of_borrowed_and_sharded_weights():
    counts = np.array([[8, 0, 0, 0], [4, 0, 0, 0]])
    table = slot_table(owners(4, 2), 2)
    lent = forecast(plan_least_loaded(counts, table, LeastLoadedOptions(min_rows=1)), SHAPE)
    expert = SHAPE.expert_bytes
    assert lent.rows.tolist() == [6, 6]
    assert (lent.weights_sent.tolist(), lent.weights_received.tolist()) == ([expert, 0], [0, expert])
    options = RelayoutOptions(3)
    plan = plan_relayout(counts, tiled_layout(4, 2, 3), options)
    assert (plan.weight_from[plan.slots >= 0] == SHARDS).all()
    need = forecast(plan, SHAPE)
    assert need.weights_received.tolist() == [3 * expert // 2] * 2
    assert need.peak[0] == 2 * expert + 3 * expert + need.rows[0] * SHAPE.activation_bytes


def test_la2_remote_part_of_an_unshard():
    eight = LayerShape(num_experts=4, hidden_size=4, expert_hidden_size=2, top_k=1, bytes_per_element=1, matrices=1)
    plan = plan_relayout(np.ones((4, 4), np.int64), tiled_layout(4, 4, 2), RelayoutOptions(2))
    assert forecast(plan, eight).weights_received.tolist() == [12] * 4


@pytest.mark.parametrize(("ranks", "megabytes"), [(32, 682.6), (8, 616.6)])
def test_la12_bytes_of_an_unshard(ranks, megabytes):
    mixtral = LayerShape(num_experts=8, hidden_size=4096, expert_hidden_size=14336, top_k=2)
    counts = np.ones((ranks, 8), np.int64)
    plan = plan_relayout(counts, tiled_layout(8, ranks, 2), RelayoutOptions(2))
    assert forecast(plan, mixtral).weights_received.max() == pytest.approx(megabytes * 1e6, rel=1e-4)
