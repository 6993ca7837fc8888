"""LLEP by hand: the numbers LL-1 ... LL-14 of the fact sheet, options, fixed slots."""

from fractions import Fraction

import numpy as np
import pytest
from twinmoe.moe_core.plan import RESIDENT, SHARDS, Plan, destinations
from twinmoe.moe_core.planners.least_loaded import (
    LeastLoadedOptions,
    is_balanced,
    plan_least_loaded,
    plan_least_loaded_sharded,
    share_of_rank,
)
from twinmoe.moe_core.planners.rationals import exact
from twinmoe.moe_core.planners.static import owners, plan_static, slot_table

PUBLISHED = LeastLoadedOptions(lambda_=None, min_rows=1, small_remainder="pseudocode")


def table(num_experts: int, ranks: int) -> np.ndarray:
    return slot_table(owners(num_experts, ranks), ranks)


def at_rank_0(loads: list[int], ranks: int) -> np.ndarray:
    counts = np.zeros((ranks, len(loads)), np.int64)
    counts[0] = loads
    return counts


def planned(loads: list[int], ranks: int, **changes) -> Plan:
    counts = at_rank_0(loads, ranks)
    plan = plan_least_loaded(counts, table(len(loads), ranks), LeastLoadedOptions(**{**vars(PUBLISHED), **changes}))
    plan.check(counts)
    return plan


def pieces(plan: Plan, expert: int) -> list[tuple[int, int, int]]:
    """(rank, start, end) of an expert's rows, empty pieces left out."""
    rows = plan.flow.sum(0)[plan.order[expert]]
    end = np.cumsum(rows)
    ranks = plan.order[expert] // plan.slots_per_rank
    return [(int(r), int(b - n), int(b)) for r, n, b in zip(ranks, rows, end) if n]


def transfers(plan: Plan) -> set[tuple[int, int]]:
    """(expert, helper) of all borrowed slots."""
    rank, slot = np.nonzero(plan.weight_from >= 0)
    return {(int(plan.slots[r, s]), int(r)) for r, s in zip(rank, slot)}


def test_ll1_base_plan():
    plan = planned([90, 5, 3, 2], 4)
    assert pieces(plan, 0) == [(0, 0, 25), (3, 25, 48), (2, 48, 70), (1, 70, 90)]
    assert [pieces(plan, e) for e in (1, 2, 3)] == [[(1, 0, 5)], [(2, 0, 3)], [(3, 0, 2)]]
    assert plan.rows_per_rank().tolist() == [25] * 4
    assert transfers(plan) == {(0, 1), (0, 2), (0, 3)}
    assert len(transfers(plan)) == -(-65 // 25)


def test_ll2_alpha_lets_owners_keep_more():
    plan = planned([90, 5, 3, 2], 4, alpha=Fraction(3, 2))
    assert pieces(plan, 0) == [(0, 0, 38), (3, 38, 74), (2, 74, 90)]
    assert plan.rows_per_rank().tolist() == [38, 5, 19, 38]
    assert transfers(planned([90, 5, 3, 2], 4, alpha=exact("3.6"))) == set()


def test_ll3_balanced_enough_stays_static():
    assert transfers(planned([30, 25, 25, 20], 4, lambda_=exact("1.3"))) == set()
    forced = planned([30, 25, 25, 20], 4)
    assert pieces(forced, 0) == [(0, 0, 25), (3, 25, 30)]
    assert forced.rows_per_rank().tolist() == [25] * 4
    assert len(transfers(forced)) == 1


def test_ll3_a_ratio_equal_to_lambda_is_planned():
    assert transfers(planned([30, 25, 25, 20], 4, lambda_=exact("1.2")))


def test_ll4_two_experts_per_rank():
    plan = planned([40, 40, 5, 5, 3, 3, 2, 2], 4)
    assert pieces(plan, 0) == [(3, 0, 21), (2, 21, 40)]
    assert pieces(plan, 1) == [(0, 0, 25), (1, 25, 40)]
    assert plan.rows_per_rank().tolist() == [25] * 4
    assert transfers(plan) == {(0, 2), (0, 3), (1, 1)}
    looser = planned([40, 40, 5, 5, 3, 3, 2, 2], 4, alpha=exact("1.2"))
    assert looser.rows_per_rank().tolist() == [30, 20, 20, 30]


def test_ll4_owned_experts_keep_their_slots_without_rows():
    plan = planned([40, 40, 5, 5, 3, 3, 2, 2], 4)
    np.testing.assert_array_equal(plan.slots, [[0, 1, -1], [2, 3, 1], [4, 5, 0], [6, 7, 0]])
    np.testing.assert_array_equal(plan.weight_from, [[RESIDENT] * 3, [-1, -1, 0], [-1, -1, 0], [-1, -1, 0]])


def test_ll5_mixed_cases():
    plan = planned([50, 30, 10, 2, 4, 1, 2, 1], 4)
    assert pieces(plan, 0) == [(3, 0, 22), (2, 22, 42), (1, 42, 50)]
    assert pieces(plan, 1) == [(0, 0, 25), (1, 25, 30)]
    assert plan.rows_per_rank().tolist() == [25] * 4
    assert len(transfers(plan)) == 4


def test_ll6_a_total_that_does_not_divide_rounds_the_cap_up():
    assert share_of_rank(101, 4, PUBLISHED) == 26
    plan = planned([91, 5, 3, 2], 4)
    assert plan.rows_per_rank().tolist() == [26, 23, 26, 26]
    assert len(transfers(plan)) == 3


def test_ll7_extremes():
    plan = planned([100, 0, 0, 0], 4)
    assert sorted(end - start for _, start, end in pieces(plan, 0)) == [25] * 4
    assert transfers(planned([7, 3], 1)) == set()
    assert planned([7, 3], 1).rows_per_rank().tolist() == [10]
    assert transfers(planned([0, 0, 0, 0], 4)) == set()
    nothing = np.zeros((4, 4), np.int64)
    assert is_balanced(nothing, owners(4, 4), LeastLoadedOptions(lambda_=exact("1.01")))


def test_ll8_small_pieces():
    loads = [40000, 24500, 24500, 11000]
    assert planned(loads, 4).rows_per_rank().tolist() == [25000] * 4
    assert len(transfers(planned(loads, 4))) == 3
    pseudocode = planned(loads, 4, min_rows=1024)
    assert pieces(pseudocode, 0) == [(0, 0, 25000), (3, 25000, 39000), (1, 39000, 40000)]
    assert pieces(pseudocode, 1) == [(1, 0, 24000), (2, 24000, 24500)]
    prose = planned(loads, 4, min_rows=1024, small_remainder="prose")
    assert pieces(prose, 0) == [(0, 0, 26000), (3, 26000, 40000)]
    assert prose.rows_per_rank().tolist() == [26000, 24500, 24500, 25000]
    assert len(transfers(prose)) == 1


def test_ll8_min_rows_must_scale_with_the_batch():
    assert planned([90, 5, 3, 2], 4, min_rows=1024).rows_per_rank().tolist() == [25, 5, 5, 65]
    prose = planned([90, 5, 3, 2], 4, min_rows=1024, small_remainder="prose")
    assert prose.rows_per_rank().tolist() == [90, 5, 3, 2]


LL9 = np.array([[30, 1, 1, 0], [20, 2, 1, 1], [25, 1, 0, 1], [15, 1, 1, 0]])


def test_ll9_send_matrix():
    plan = plan_least_loaded(LL9, table(4, 4), PUBLISHED)
    np.testing.assert_array_equal(plan.send_matrix(), [[25, 1, 1, 5], [0, 2, 3, 19], [0, 6, 20, 1], [0, 16, 1, 0]])
    assert plan.send_matrix().sum(1).tolist() == [32, 24, 27, 17]
    assert plan.send_matrix().sum(0).tolist() == [25] * 4


def test_ll9_source_first_keeps_what_it_can():
    options = LeastLoadedOptions(**{**vars(PUBLISHED), "spill_order": "source_first"})
    plan = plan_least_loaded(LL9, table(4, 4), options)
    plan.check(LL9)
    np.testing.assert_array_equal(plan.send_matrix(), [[25, 1, 1, 5], [0, 22, 1, 1], [0, 1, 22, 4], [0, 1, 1, 15]])
    published = plan_least_loaded(LL9, table(4, 4), PUBLISHED)
    np.testing.assert_array_equal(plan.flow.sum(0), published.flow.sum(0))


def test_ll12_linear_experts_give_the_same_outputs_and_gradients():
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((4, 3, 2))
    plan = plan_least_loaded(LL9, table(4, 4), PUBLISHED)
    ids = [np.repeat(np.arange(4), row)[rng.permutation(row.sum())] for row in LL9]
    x = [rng.standard_normal((len(i), 3)) for i in ids]
    g = [rng.standard_normal((len(i), 2)) for i in ids]
    gradient = np.zeros_like(weights)
    for source in range(4):
        dest = destinations(plan, source, ids[source])
        out = np.zeros((len(dest), 2))
        for slot in np.unique(dest):
            here = dest == slot
            expert = plan.slots.reshape(-1)[slot]
            out[here] = x[source][here] @ weights[expert]
            gradient[expert] += x[source][here].T @ g[source][here]
        expected = np.einsum("nd,ndf->nf", x[source], weights[ids[source]])
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-14)
    every_x, every_g, every_id = np.concatenate(x), np.concatenate(g), np.concatenate(ids)
    for e in range(4):
        np.testing.assert_allclose(gradient[e], every_x[every_id == e].T @ every_g[every_id == e], rtol=0, atol=1e-12)
    assert sum(end - start for _, start, end in pieces(plan, 0)) == 25 + 23 + 22 + 20


def test_ll13_equal_loads_are_placed_by_id():
    plan = planned([40, 40, 0, 0], 4)
    assert pieces(plan, 0) == [(0, 0, 20), (2, 20, 40)]
    assert pieces(plan, 1) == [(1, 0, 20), (3, 20, 40)]


def test_ll14_balance_is_judged_by_rank():
    counts = np.zeros((8, 128), np.int64)
    counts[0, :4] = 15 * 31
    counts[0, 4:] = 85
    options = {"alpha": Fraction(1), "min_rows": 1}
    assert not is_balanced(counts, owners(128, 8), LeastLoadedOptions(lambda_=exact("1.7"), **options))
    assert is_balanced(counts, owners(128, 8), LeastLoadedOptions(lambda_=exact("2.0"), **options))


def test_helpers_on_the_owners_node_come_first():
    plan = planned([60, 20, 12, 8], 4, node_of=(0, 0, 1, 1))
    assert pieces(plan, 0) == [(0, 0, 25), (1, 25, 30), (3, 30, 47), (2, 47, 60)]


def test_pieces_across_nodes_may_have_a_larger_minimum():
    plan = planned([60, 20, 12, 8], 4, node_of=(0, 0, 1, 1), min_rows_far=15, small_remainder="prose")
    assert pieces(plan, 0) == [(0, 0, 38), (1, 38, 43), (3, 43, 60)]


def test_what_finds_no_helper_with_room_for_weights_stays_with_the_owner():
    plan = planned([90, 5, 3, 2], 4, max_borrowed=0)
    assert plan.rows_per_rank().tolist() == [90, 5, 3, 2]
    plan = planned([50, 40, 5, 5, 0, 0, 0, 0], 2, max_borrowed=1)
    assert (plan.weight_from >= 0).sum(1).max() == 1
    assert plan.rows_per_rank().tolist() == [50, 50]


def test_a_row_budget_plans_what_lambda_would_leave_alone_and_lowers_the_share():
    loads = [30, 25, 25, 20]
    assert planned(loads, 4, lambda_=exact("1.3"), max_rows_per_rank=26).rows_per_rank().max() == 25
    assert planned([90, 5, 3, 2], 4, alpha=exact("1.5"), max_rows_per_rank=30).rows_per_rank().max() == 30
    assert planned([90, 5, 3, 2], 4, max_rows_per_rank=10).rows_per_rank().max() == 25


def test_experts_that_do_not_divide_among_ranks_keep_dense_slots():
    counts = at_rank_0([2, 2, 90, 2, 2], 3)
    plan = plan_least_loaded(counts, table(5, 3), PUBLISHED)
    plan.check(counts)
    np.testing.assert_array_equal(plan.slots, [[0, 1, 2], [2, 3, -1], [4, 2, -1]])
    np.testing.assert_array_equal(plan.weight_from, [[-1, -1, 1], [-1, -1, -1], [-1, 1, -1]])


def test_balanced_counts_give_the_static_plan():
    counts = np.full((4, 8), 3)
    plan, static = plan_least_loaded(counts, table(8, 4), LeastLoadedOptions()), plan_static(counts, table(8, 4))
    np.testing.assert_array_equal(plan.flow, static.flow)
    np.testing.assert_array_equal(plan.slots, static.slots)


def test_fixed_slots_take_spilled_experts_and_level_the_rest_over_holders():
    counts = at_rank_0([90, 5, 3, 2], 4)
    roomy = plan_least_loaded_sharded(counts, table(4, 4), 2, PUBLISHED)
    roomy.check(counts)
    assert roomy.slots.shape == (4, 2)
    assert roomy.rows_per_rank().tolist() == [25] * 4
    assert set(roomy.weight_from[roomy.slots >= 0].tolist()) == {SHARDS}
    tight = plan_least_loaded_sharded(at_rank_0([60, 30, 6, 4], 2), table(4, 2), 3, PUBLISHED)
    assert tight.slots.shape == (2, 3)
    assert tight.rows_per_rank().tolist() == [50, 50]
    none = plan_least_loaded_sharded(counts, table(4, 4), 1, PUBLISHED)
    assert none.rows_per_rank().tolist() == [90, 5, 3, 2]


def test_fixed_slots_level_overflow_that_an_owner_would_keep():
    counts = at_rank_0([70, 60, 0, 0, 0, 0, 30, 0], 4)
    plan = plan_least_loaded_sharded(counts, table(8, 4), 3, PUBLISHED)
    plan.check(counts)
    assert pieces(plan, 0) == [(1, 0, 40), (2, 40, 70)]
    assert pieces(plan, 1) == [(0, 0, 45), (3, 45, 60)]
    owner_keeps = plan_least_loaded(counts, table(8, 4), LeastLoadedOptions(**{**vars(PUBLISHED), "max_borrowed": 1}))
    assert owner_keeps.rows_per_rank().tolist() == [50, 40, 30, 40]


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"alpha": Fraction(1, 2)}, "alpha >= 1"),
        ({"alpha": Fraction(2)}, "lambda >= alpha"),
        ({"min_rows": 0}, "at least 1"),
    ],
)
def test_contradictory_options_are_refused(changes, remedy):
    with pytest.raises(ValueError, match=remedy):
        LeastLoadedOptions(**changes)


def test_bad_inputs_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="slot_table"):
        plan_least_loaded(np.ones((2, 3), np.int64), np.array([[0], [1]]), PUBLISHED)
    with pytest.raises(ValueError, match="one node per rank"):
        planned([90, 5, 3, 2], 4, node_of=(0, 1))
    with pytest.raises(ValueError, match="at least 2"):
        plan_least_loaded_sharded(np.ones((2, 4), np.int64), table(4, 2), 1, PUBLISHED)
    with pytest.raises(ValueError, match="as text"):
        exact(1.3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="as text"):
        exact("fast")
