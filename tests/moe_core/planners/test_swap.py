"""Expert swap: counts of every pair, the smooth maximum, and what is chosen (the sheet's H7, H9, H10)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmoe.moe_core.planners.swap import (
    Demand,
    Objective,
    Threshold,
    best_swap,
    count_level,
    counts_after_swap,
    demand_of,
    hierarchical_objective,
    load_objective,
    loads_after_swap,
    modelled_seconds,
    smooth_max,
)
from twinmoe.moe_core.topology import Level, Link, Topology
from twinmoe.testing.moe_core.transport.harness import TABLE

RANK_OF = np.arange(8) // 2
H7_CHOICES = [(0, 4)] * 3 + [(1, 5)] * 2 + [(2, 6), (3, 7)]


def choices(rows: list[tuple[int, ...]] | np.ndarray, num_experts: int) -> np.ndarray:
    chosen = np.zeros((len(rows), num_experts), np.int64)
    for token, row in enumerate(rows):
        chosen[token, list(row)] = 1
    return chosen


def recount(chosen: np.ndarray, unit_E: np.ndarray, units: int) -> np.ndarray:
    return np.array([(chosen[:, unit_E == u].sum(1) > 0).sum() for u in range(units)])


def exchanged(unit_E: np.ndarray, a: int, b: int) -> np.ndarray:
    moved = unit_E.copy()
    moved[[a, b]] = unit_E[[b, a]]
    return moved


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([(8, 2), (8, 4), (9, 3), (6, 6)]))
def test_h9_counts_after_a_swap_are_those_of_a_recount(seed: int, top_k: int, shape: tuple[int, int]):
    num_experts, units = shape
    rng = np.random.default_rng(seed)
    chosen = choices(np.argsort(rng.random((7, num_experts)), axis=1)[:, :top_k], num_experts)
    unit_E = rng.permutation(np.arange(num_experts) % units)
    counts = count_level(chosen, unit_E, units)
    after = counts_after_swap(counts)
    for a in range(num_experts):
        for b in range(num_experts):
            np.testing.assert_array_equal(after[a, b], recount(chosen, exchanged(unit_E, a, b), units))
    np.testing.assert_array_equal(after, after.transpose(1, 0, 2))


@pytest.mark.parametrize("units", [2, 4])
def test_h9_the_table(units: int):
    chosen, unit_E = choices(TABLE.reshape(8, 4), 8), np.arange(8) * units // 8
    counts = count_level(chosen, unit_E, units)
    after = counts_after_swap(counts)
    for a in range(8):
        for b in range(8):
            np.testing.assert_array_equal(after[a, b], recount(chosen, exchanged(unit_E, a, b), units))
            if unit_E[a] == unit_E[b]:
                np.testing.assert_array_equal(after[a, b], counts.hit_U)


def test_h9_cases_of_one_token():
    after = counts_after_swap(count_level(choices([(0, 1, 4)], 8), RANK_OF, 4))
    assert after[0, 0].tolist() == [1, 0, 1, 0]
    assert after[0, 6].tolist() == [1, 0, 1, 1]
    assert after[4, 6].tolist() == [1, 0, 0, 1]
    assert after[0, 5].tolist() == [1, 0, 1, 0]
    assert counts_after_swap(count_level(choices([(0, 4)], 8), RANK_OF, 4))[4, 1].tolist() == [1, 0, 0, 0]


def test_h9_the_papers_figure_7():
    after = counts_after_swap(count_level(choices([(0, 1), (0, 2), (0, 2), (1, 3)], 4), np.array([0, 0, 1, 1]), 2))
    assert after[0, 0].tolist() == [4, 3]
    assert after[0, 2].tolist() == after[1, 3].tolist() == [4, 4]
    assert after[1, 2].tolist() == [3, 2]
    assert after[0, 3].tolist() == [2, 3]


def test_h10_smooth_maximum():
    values = {(4, 4): 4.2871, (3, 2): 3.0052, (10, 10, 10, 10): 11.487, (10, 1, 1, 1): 10.0}
    values[(5, 4, 3, 2, 1, 0, 0, 0)] = 5.0541
    for x, expected in values.items():
        assert smooth_max(np.array(x), 10) == pytest.approx(expected, abs=5e-5)
    assert smooth_max(np.zeros(3), 10) == 0
    x = np.random.default_rng(0).random((50, 6))
    ratio = smooth_max(x, 10) / smooth_max(x, None)
    assert ratio.min() > 1 - 1e-12
    assert ratio.max() <= 6**0.1


def test_h10_the_smooth_maximum_breaks_ties():
    demand = demand_of(choices(TABLE.reshape(8, 4), 8), RANK_OF, 4, (2, 4))
    plain = modelled_seconds(demand, Objective((16.0, 2.0), smooth=None), 4)
    assert plain.min() == plain[0, 0] == 124.0
    swap = best_swap(demand, Objective((16.0, 2.0)), 4, Threshold(relative=0))
    assert swap is not None
    assert (swap.first, swap.second) == (0, 2)
    assert (swap.before, swap.after) == (pytest.approx(133.503, abs=5e-4), pytest.approx(133.440, abs=5e-4))


def h7_steps(objective: Objective) -> list[tuple[int, int, float, float]]:
    """Swaps until none helps, with the modelled time after each and the rows of the busiest rank."""
    chosen, rank_E, found = choices(H7_CHOICES, 8), RANK_OF, []
    while True:
        demand = demand_of(chosen, rank_E, 4, (2, 4) if objective.seconds_per_token else ())
        swap = best_swap(demand, objective, 4)
        if swap is None:
            return found
        rank_E = exchanged(rank_E, swap.first, swap.second)
        found.append((swap.first, swap.second, swap.after, float(np.bincount(rank_E, chosen.sum(0)).max())))


def test_h7_swaps_see_what_deduplication_saves():
    assert h7_steps(Objective((16.0, 2.0), smooth=None)) == [(0, 5, 86.0, 6.0), (2, 7, 70.0, 6.0)]
    smooth = h7_steps(Objective((16.0, 2.0)))
    assert [(a, b, round(q, 3)) for a, b, q, _ in smooth] == [(0, 5, 86.851), (2, 7, 70.362)]


def test_h7_a_load_objective_finds_nothing_and_a_compute_term_stops_the_harm():
    assert h7_steps(load_objective()) == []
    chosen, before = choices(H7_CHOICES, 8), RANK_OF
    rank_E = exchanged(exchanged(before, 0, 5), 2, 7)
    assert np.bincount(rank_E, chosen.sum(0)).tolist() == [4, 2, 6, 2]
    with_compute = h7_steps(Objective((16.0, 2.0), seconds_per_row=40.0, smooth=None))
    assert [rows for *_, rows in with_compute] == [5.0, 4.0]
    assert with_compute[-1][2] == 72.0 + 40.0 * 4


def test_loads_after_a_swap():
    load_E = np.array([5, 1, 2, 4])
    after = loads_after_swap(load_E, np.array([0, 0, 1, 1]), 2)
    assert after[0, 0].tolist() == after[0, 1].tolist() == [6, 6]
    assert after[0, 2].tolist() == after[2, 0].tolist() == [3, 9]


def test_a_swap_must_pay_for_itself():
    demand = demand_of(choices(H7_CHOICES, 8), RANK_OF, 4, (2, 4))
    objective = Objective((16.0, 2.0), smooth=None)
    assert best_swap(demand, objective, 4, Threshold(transfer_seconds=35.0)) is not None
    assert best_swap(demand, objective, 4, Threshold(transfer_seconds=36.0)) is None
    assert best_swap(demand, objective, 4, Threshold(transfer_seconds=36.0, horizon=2)) is not None
    assert best_swap(demand, objective, 4, Threshold(relative=0.3)) is None


def test_no_demand_no_swap():
    nothing = demand_of(np.zeros((0, 8), np.int64), RANK_OF, 4, (2, 4))
    assert best_swap(nothing, Objective((16.0, 2.0)), 4) is None
    assert best_swap(Demand(np.array([3]), np.array([0])), load_objective(), 1) is None


def test_the_objective_of_a_topology_is_four_exchanges():
    topology = Topology(4, (Level("cluster", 1, Link(5.0, 0.5)), Level("node", 2, Link(3.0, 0.25), Link(1.0, 1.0))))
    deep = hierarchical_objective(topology, 2, row_bytes=8)
    assert deep.seconds_per_token == (4 * 8 * 1.0 * 2 / 4, 4 * 8 * 0.25)
    assert deep.fixed == 4 * (1.0 + 3.0)
    assert hierarchical_objective(topology, 1, row_bytes=8).seconds_per_token == (4 * 8 * 0.5,)
