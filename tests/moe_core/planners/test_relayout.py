"""LAER by hand: LA-5 ... LA-11, LA-14, LA-15; plans, borrowing, and layouts at a fixed lag."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmoe.moe_core.plan import RESIDENT, SHARDS
from twinmoe.moe_core.planners import relayout
from twinmoe.moe_core.planners.cost import CostModel
from twinmoe.moe_core.planners.layout import Layout, strided_layout, tiled_layout
from twinmoe.moe_core.planners.rationals import imbalance
from twinmoe.moe_core.planners.relayout import (
    RelayoutOptions,
    RelayoutState,
    candidates,
    layout_cost,
    plan_relayout,
    send_matrix,
    solve,
)
from twinmoe.moe_core.planners.static import owners, slot_table

LAWS = settings(deadline=None, max_examples=60)
RELEASED = replace(CostModel.measured(8192, 216_269_000_000, 88_953_900_000, Fraction("1.484375e-6")), comm="sum")


def options(slots: int, ranks: int, per_node: int, **changes) -> RelayoutOptions:
    """As the numbers of the sheet: no rotation, the released cost."""
    node_of = tuple((np.arange(ranks) // per_node).tolist())
    return RelayoutOptions(slots, node_of, **{"rotate": False, "cost": RELEASED, **changes})


LA6 = np.array([[15, 5, 3, 2], [15, 5, 2, 3]] * 2)


def test_la6_routed_loads_and_costs():
    chosen = options(2, 4, 4)
    layouts = {**candidates(LA6, chosen), "fixed": strided_layout(4, 4, 2)}
    rows = {name: send_matrix(LA6, layout, chosen).sum(0).tolist() for name, layout in layouts.items()}
    assert rows == {"heap": [28, 24, 26, 22], "even": [38, 32, 18, 12], "fixed": [38, 18, 32, 12]}
    cost = {name: layout_cost(LA6, layout, chosen) for name, layout in layouts.items()}
    comm = {name: round(1e6 * float(c.comm), 2) for name, c in cost.items()}
    compute = {name: float(1_000_000 * c.compute) for name, c in cost.items()}
    assert comm == {"fixed": 11.21, "even": 11.36, "heap": 11.21}
    assert compute == {"fixed": 225.625, "even": 225.625, "heap": 166.25}
    np.testing.assert_array_equal(solve(LA6, layouts["fixed"], chosen).slots, layouts["heap"].slots)


def test_la6_a_source_splits_an_expert_over_its_slots():
    chosen = options(2, 4, 4)
    plan = plan_relayout(LA6, candidates(LA6, chosen)["heap"], chosen)
    plan.check(LA6)
    assert plan.flow[0, plan.order[0]].tolist() == [4, 4, 4, 3]


def test_la7_two_nodes_exchange_nothing():
    counts, chosen = np.array([[10, 5, 3, 2]] * 8), options(2, 8, 4)
    send = send_matrix(counts, candidates(counts, chosen)["heap"], chosen)
    assert send.sum(0).tolist() == [20, 24, 20, 16] * 2
    assert send[:4, 4:].sum() == send[4:, :4].sum() == 0
    fixed = send_matrix(counts, strided_layout(4, 8, 2), chosen).sum(0)
    assert imbalance(fixed) == Fraction(14, 10)


def test_la7_replicas_on_one_rank_become_one_slot():
    counts, chosen = np.array([[10, 5, 3, 2]] * 8), options(2, 8, 4)
    layout = candidates(counts, chosen)["heap"]
    plan = plan_relayout(counts, layout, chosen)
    plan.check(counts)
    assert layout.slots[1].tolist() == [0, 0]
    assert plan.slots[1].tolist() == [0, -1]
    assert plan.rows_per_slot(1).tolist() == [24, 0]
    np.testing.assert_array_equal(plan.send_matrix(), send_matrix(counts, layout, chosen))


def test_la8_the_local_rule_leaves_skew_between_nodes():
    chosen = options(2, 8, 4)
    layout = candidates(np.array([[10, 5, 3, 2]] * 8), chosen)["heap"]
    counts = np.array([[20, 0, 6, 0]] * 4 + [[0, 10, 0, 4]] * 4)
    assert counts.sum(0).tolist() == [80, 40, 24, 16]
    send = send_matrix(counts, layout, chosen)
    assert send.sum(0).tolist() == [24, 40, 20, 20, 16, 0, 20, 20]
    assert send[:4, 4:].sum() == send[4:, :4].sum() == 0


def test_la9_scarce_slots_cross_nodes():
    counts, chosen = np.array([[13, 8, 5], [12, 7, 5]] * 2), options(1, 4, 2)
    send = send_matrix(counts, candidates(counts, chosen)["heap"], chosen)
    assert send.sum(0).tolist() == [30, 25, 25, 20]
    assert send[:2, 2:].sum() + send[2:, :2].sum() == 25


@pytest.mark.parametrize(
    ("slots", "nodes", "rows", "expected"),
    [
        ([[0], [0]], (0, 0), 7, [4, 3]),
        ([[0, 0], [-1, -1], [-1, -1], [0, -1]], (0,) * 4, 10, [7, 0, 0, 3]),
        ([[0], [0], [0]], (0, 0, 1), 9, [5, 4, 0]),
        ([[-1], [-1], [0]], (0, 0, 1), 9, [0, 0, 9]),
    ],
)
def test_la10_arithmetic_of_the_local_rule(slots, nodes, rows, expected):
    counts = np.zeros((len(slots), 1), np.int64)
    counts[0] = rows
    chosen = RelayoutOptions(len(slots[0]), nodes, rotate=False)
    assert send_matrix(counts, Layout(np.array(slots)), chosen)[0].tolist() == expected


def test_la11_paper_scale():
    counts = np.array([[12059, 6028, 4018, 3014, 2411, 2009, 1722, 1507]] * 32)
    model = replace(RELEASED, row_compute=Fraction("0.0067096") / 4096)
    chosen = options(2, 32, 8, cost=model)
    layouts = {**candidates(counts, chosen), "fixed": strided_layout(8, 32, 2)}
    ratio = {n: round(float(imbalance(send_matrix(counts, x, chosen).sum(0))), 3) for n, x in layouts.items()}
    assert ratio == {"fixed": 1.767, "even": 1.656, "heap": 1.079}
    assert layouts["heap"].multiplicity(8).sum(1).tolist() == [20, 12, 8, 8, 4, 4, 4, 4]
    compute = {n: round(float(layout_cost(counts, x, chosen).compute), 3) for n, x in layouts.items()}
    assert compute == {"fixed": 0.379, "even": 0.356, "heap": 0.232}
    assert round(float(layout_cost(counts, layouts["heap"], chosen).comm), 3) == 0.139
    busiest = replace(chosen, cost=replace(model, comm="max"))
    assert round(float(layout_cost(counts, layouts["heap"], busiest).comm), 4) == 0.0044


def test_la15_remainders_are_counted_once():
    counts = np.array([[5], [0]])
    assert send_matrix(counts, tiled_layout(1, 2, 1), options(1, 2, 2)).sum() == 5


def test_rotation_spreads_remainders_over_slots():
    counts = np.ones((4, 1), np.int64)
    layout = tiled_layout(1, 4, 1)
    assert send_matrix(counts, layout, options(1, 4, 4)).sum(0).tolist() == [4, 0, 0, 0]
    assert send_matrix(counts, layout, options(1, 4, 4, rotate=True)).sum(0).tolist() == [1, 1, 1, 1]


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, RelayoutOptions]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ranks, slots = draw(st.integers(1, 64)), draw(st.integers(1, 12))
    num_experts = int(rng.integers(1, min(512, ranks * slots) + 1))
    shares = rng.dirichlet(np.full(num_experts, draw(st.sampled_from([0.05, 0.5, 20.0]))))
    counts = np.stack([rng.multinomial(n, shares) for n in rng.integers(0, 3000, ranks)]).astype(np.int64)
    return counts, options(slots, ranks, draw(st.integers(1, 8)), rotate=draw(st.booleans()))


@LAWS
@given(problems())
def test_rows_are_conserved_and_nodes_keep_what_they_can(problem):
    counts, chosen = problem
    num_experts = counts.shape[1]
    node = np.array(chosen.node_of)
    for layout in candidates(counts, chosen).values():
        held = layout.multiplicity(num_experts)
        plan = plan_relayout(counts, layout, chosen)
        plan.check(counts)
        np.testing.assert_array_equal(plan.weight_from == SHARDS, plan.slots >= 0)
        np.testing.assert_array_equal(plan.send_matrix(), send_matrix(counts, layout, chosen))
        at_node = np.stack([held[:, node == n].sum(1) for n in range(node[-1] + 1)], 1)
        inside = plan.send_matrix()[node[:, None] == node].sum()
        assert inside >= counts[at_node.T[node] > 0].sum()
        for slots in plan.slots:
            assert len(set(slots[slots >= 0].tolist())) == (slots >= 0).sum()


@LAWS
@given(problems())
def test_la14_layouts_depend_on_column_sums_alone(problem):
    counts, chosen = problem
    shuffled = np.random.default_rng(1).permutation(counts)
    for name, layout in candidates(counts, chosen).items():
        np.testing.assert_array_equal(candidates(shuffled, chosen)[name].slots, layout.slots)


@LAWS
@given(problems())
def test_la14_sources_of_one_node_are_interchangeable(problem):
    counts, chosen = problem
    chosen = replace(chosen, rotate=False)
    node = np.array(chosen.node_of)
    order = np.lexsort((np.random.default_rng(2).random(len(node)), node))
    layout = candidates(counts, chosen)["heap"]
    np.testing.assert_array_equal(
        send_matrix(counts[order], layout, chosen), send_matrix(counts, layout, chosen)[order]
    )


@LAWS
@given(problems())
def test_borrowed_plans_put_the_same_rows_on_the_same_ranks(problem):
    counts, chosen = problem
    ranks, num_experts = counts.shape
    table = slot_table(owners(num_experts, ranks), ranks)
    layout = candidates(counts, chosen)["heap"]
    sharded, borrowed = plan_relayout(counts, layout, chosen), plan_relayout(counts, layout, chosen, table)
    borrowed.check(counts)
    np.testing.assert_array_equal(borrowed.send_matrix(), sharded.send_matrix())
    native = table >= 0
    np.testing.assert_array_equal(borrowed.slots[:, : table.shape[1]][native], table[native])
    lent = borrowed.weight_from >= 0
    np.testing.assert_array_equal(borrowed.weight_from[lent], owners(num_experts, ranks)[borrowed.slots[lent]])
    assert (borrowed.weight_from[~lent] == RESIDENT).all()
    assert (borrowed.weight_from != np.arange(ranks)[:, None]).all()


def test_a_search_keeps_the_layout_without_a_clear_gain():
    counts = np.array([[100, 0], [0, 98]])
    current = Layout(np.array([[0], [1]]))
    assert solve(counts, current, options(1, 2, 2)) is current
    uneven = np.array([[60, 0], [0, 50]])
    assert solve(uneven, current, options(1, 2, 2)) is current
    skewed = np.array([[100, 0], [100, 2]])
    assert solve(skewed, Layout(np.array([[0, 1], [1, 1]])), options(2, 2, 2)).slots.tolist() == [[0, 1], [0, 1]]
    assert solve(np.zeros((2, 2), np.int64), current, options(1, 2, 2)) is current
    assert solve(skewed, current, options(1, 2, 2, heap=False, even=False)) is current


def drifting(calls: int, ranks: int = 4, num_experts: int = 6) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    base = 1.0 / np.arange(1, num_experts + 1)
    return [rng.multinomial(2000, np.roll(base, c // 3) / base.sum(), ranks).astype(np.int64) for c in range(calls)]


@pytest.mark.parametrize("lag", [1, 2, 3])
def test_the_layout_made_after_a_call_serves_exactly_lag_calls_later(lag):
    chosen = options(2, 4, 4, lag=lag, window=3)
    first = tiled_layout(6, 4, 2)
    state = relayout.start(first, 6, chosen)
    used: list[Layout] = []
    seen = drifting(12)
    for call, counts in enumerate(seen):
        assert state.call == call
        layout = relayout.next_layout(state)
        if call < lag:
            expected = first
        else:
            made_at = call - lag
            window = sum(seen[max(0, made_at - 2) : made_at + 1], np.zeros_like(counts))
            expected = solve(window, used[made_at], chosen)
        np.testing.assert_array_equal(layout.slots, expected.slots)
        used.append(layout)
        state = relayout.advance(state, counts, chosen)
    assert len({layout.slots.tobytes() for layout in used}) > 2


def test_a_state_survives_a_checkpoint():
    chosen = options(2, 4, 4, lag=2)
    state = relayout.start(tiled_layout(6, 4, 2), 6, chosen)
    seen = drifting(8)
    for counts in seen[:5]:
        state = relayout.advance(state, counts, chosen)
    again = RelayoutState.of_arrays({name: array.copy() for name, array in state.arrays().items()})
    for counts in seen[5:]:
        state, again = relayout.advance(state, counts, chosen), relayout.advance(again, counts, chosen)
        np.testing.assert_array_equal(relayout.next_layout(again).slots, relayout.next_layout(state).slots)


def test_a_call_cannot_start_before_its_layout():
    chosen = options(2, 4, 4)
    state, _ = relayout.observe(relayout.start(tiled_layout(6, 4, 2), 6, chosen), drifting(1)[0], chosen)
    with pytest.raises(RuntimeError, match="call 1 is still being searched"):
        relayout.next_layout(state)


def test_bad_inputs_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="at least 1 call"):
        RelayoutOptions(2, lag=0)
    with pytest.raises(ValueError, match="at least 3 slots"):
        candidates(np.ones((2, 5), np.int64), RelayoutOptions(2))
    with pytest.raises(ValueError, match="no slot"):
        plan_relayout(np.ones((2, 3), np.int64), Layout(np.array([[0], [1]])), RelayoutOptions(1))
