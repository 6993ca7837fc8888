"""Owners, slot tables and the static plan."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmoe.moe_core.planners.static import owners, plan_static, slot_table


def test_shares_are_contiguous_and_the_first_ranks_own_one_more():
    assert owners(7, 3).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert slot_table(owners(7, 3), 3).tolist() == [[0, 1, 2], [3, 4, -1], [5, 6, -1]]


def test_ranks_without_experts_keep_an_empty_slot():
    assert slot_table(owners(1, 3), 3).tolist() == [[0], [-1], [-1]]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 64), st.integers(1, 512))
def test_every_row_goes_to_the_owner(seed, ranks, num_experts):
    counts = np.random.default_rng(seed).integers(0, 9, (ranks, num_experts))
    owner = owners(num_experts, ranks)
    plan = plan_static(counts, slot_table(owner, ranks))
    plan.check(counts)
    assert plan.one_slot_per_expert
    np.testing.assert_array_equal(plan.rows_per_rank(), [counts[:, owner == r].sum() for r in range(ranks)])
