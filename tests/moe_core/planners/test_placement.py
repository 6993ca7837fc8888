"""Replica counts and placement: LA-5 ... LA-7, LA-9, LA-14, and laws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmoe.moe_core.planners.layout import Layout, strided_layout, tiled_layout
from twinmoe.moe_core.planners.placement import even_replicas, heap_replicas, place

LAWS = settings(deadline=None, max_examples=60)


def multiplicity(load: list[int], replicas: list[int], slots: int, nodes: list[int]) -> list[list[int]]:
    placed = place(np.array(load), np.array(replicas), slots, np.array(nodes))
    return Layout(placed).multiplicity(len(load)).tolist()


def test_la5_the_largest_load_per_replica_gets_the_next_slot():
    assert heap_replicas(np.array([60, 20, 10, 10]), 8, 1).tolist() == [4, 2, 1, 1]


def test_la6_replicas_go_to_the_lightest_rank():
    assert multiplicity([60, 20, 10, 10], [4, 2, 1, 1], 2, [0] * 4) == [
        [1, 1, 1, 1],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 1],
    ]


def test_la7_replicas_spread_over_nodes_and_may_repeat_on_a_rank():
    assert heap_replicas(np.array([80, 40, 24, 16]), 16, 2).tolist() == [8, 4, 2, 2]
    assert multiplicity([80, 40, 24, 16], [8, 4, 2, 2], 2, [0] * 4 + [1] * 4) == [
        [0, 2, 1, 1, 0, 2, 1, 1],
        [0, 0, 1, 1, 0, 0, 1, 1],
        [1, 0, 0, 0, 1, 0, 0, 0],
        [1, 0, 0, 0, 1, 0, 0, 0],
    ]


def test_la9_scarce_slots():
    assert heap_replicas(np.array([50, 30, 20]), 4, 2).tolist() == [2, 1, 1]
    assert multiplicity([50, 30, 20], [2, 1, 1], 1, [0, 0, 1, 1]) == [[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]


def test_ties_go_to_the_larger_load_then_the_lower_id():
    assert heap_replicas(np.array([20, 40, 20]), 5, 1).tolist() == [1, 3, 1]
    assert heap_replicas(np.array([10, 10, 10]), 4, 1).tolist() == [2, 1, 1]


def test_even_replicas_exist_only_where_slots_divide():
    assert even_replicas(3, 7) is None
    assert even_replicas(4, 8) is not None


def test_too_many_replicas_are_refused():
    with pytest.raises(ValueError, match="raise the number of slots"):
        place(np.array([1, 1]), np.array([2, 1]), 1, np.array([0, 0]))


def test_fixed_layouts():
    assert tiled_layout(2, 2, 2).slots.tolist() == [[0, 1], [0, 1]]
    assert strided_layout(8, 4, 2).slots.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert strided_layout(3, 4, 1).slots.tolist() == [[0], [1], [2], [0]]
    assert strided_layout(3, 2, 2).slots.tolist() == [[0, 2], [1, -1]]
    with pytest.raises(ValueError, match="at least 4 slots"):
        tiled_layout(8, 2, 3)
    with pytest.raises(ValueError, match="no slot"):
        Layout(np.array([[0, 2]])).multiplicity(3)


@LAWS
@given(st.integers(0, 2**32), st.integers(1, 64), st.integers(1, 8), st.integers(1, 16))
def test_every_expert_has_a_slot_and_every_slot_is_used(seed, ranks, per_node, slots):
    rng = np.random.default_rng(seed)
    num_experts = int(rng.integers(1, min(512, ranks * slots) + 1))
    load = rng.multinomial(10**6, rng.dirichlet(np.full(num_experts, 0.2)))
    node = np.arange(ranks) // per_node
    nodes = int(node[-1]) + 1
    replicas = heap_replicas(load, ranks * slots, nodes)
    assert replicas.min() >= 1
    assert replicas.sum() == ranks * slots
    if nodes * num_experts <= ranks * slots and ranks % per_node == 0:
        assert (replicas % nodes == 0).all()
    np.testing.assert_array_equal(heap_replicas(7 * load, ranks * slots, nodes), replicas)
    placed = place(load, replicas, slots, node)
    assert placed.shape == (ranks, slots)
    np.testing.assert_array_equal(np.bincount(placed.reshape(-1), minlength=num_experts), replicas)
    assert (np.diff(placed, axis=1) >= 0).all()


@LAWS
@given(st.integers(0, 2**32), st.integers(2, 32), st.integers(1, 8))
def test_slots_without_replicas_stay_empty_and_last(seed, ranks, slots):
    rng = np.random.default_rng(seed)
    num_experts = int(rng.integers(1, ranks * slots + 1))
    placed = place(rng.integers(0, 50, num_experts), np.ones(num_experts, np.int64), slots, np.zeros(ranks, np.int64))
    assert sorted(placed[placed >= 0].tolist()) == list(range(num_experts))
    assert ((placed[:, 1:] < 0) | (placed[:, :-1] >= 0)).all()
