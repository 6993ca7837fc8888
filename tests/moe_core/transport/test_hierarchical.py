"""hierarchical_dedup moves less and computes the same as flat, at every depth, under any plan."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmoe.backends.reference import ops
from twinmoe.moe_core.planners.least_loaded import LeastLoadedOptions, plan_least_loaded
from twinmoe.moe_core.planners.relayout import RelayoutOptions, candidates, plan_relayout
from twinmoe.moe_core.planners.static import owners, plan_static, slot_table
from twinmoe.moe_core.topology import Topology
from twinmoe.moe_core.transport.packing import digits, pack, unpack, words
from twinmoe.testing.moe_core.transport.harness import (
    TABLE,
    WIDTH,
    MakeTransport,
    Outcome,
    Problem,
    assert_same,
    counts_of,
    flat,
    hierarchical,
    levels,
    random_ids,
    run,
)

TINY = Topology(4, levels(1, 2))
"""2 nodes x 2 ranks, 8 experts, 2 per rank."""


def static(ids: list[np.ndarray], num_experts: int) -> Problem:
    table = slot_table(owners(num_experts, len(ids)), len(ids))
    return Problem(ids, plan_static(counts_of(ids, num_experts), table))


def rows_of(outcomes: list[Outcome], row_bytes: int) -> list[list[list[int]]]:
    return [(t.sent // row_bytes).tolist() for t in outcomes[0].exchange.traffic]


ROW = 8 * WIDTH + 4 * 8 + 8
"""Bytes of a row of the tiny case in float64: width, four weights, one word of ids."""


def test_h1_h2_send_matrices_and_rows_between_nodes():
    problem = static(list(TABLE), 8)
    plain, one, two = (run(problem, make) for make in (flat, hierarchical(TINY, 1), hierarchical(TINY, 2)))
    assert rows_of(plain, 8 * WIDTH) == [[[2, 1, 3, 2], [1, 1, 3, 3], [3, 2, 2, 1], [2, 2, 1, 3]]]
    assert rows_of(one, ROW) == [[[1, 1, 2, 1], [1, 1, 2, 2], [2, 1, 1, 1], [2, 2, 1, 2]]]
    assert rows_of(two, ROW) == [
        [[2, 0, 2, 0], [0, 1, 0, 2], [2, 0, 1, 0], [0, 2, 0, 2]],
        [[3, 2, 0, 0], [3, 3, 0, 0], [0, 0, 3, 2], [0, 0, 3, 4]],
    ]

    def crossing(outcomes: list[Outcome], row_bytes: int) -> dict[str, int]:
        found = [TINY.bytes_by_level(t.sent // row_bytes) for t in outcomes[0].exchange.traffic]
        return {name: sum(f[name] for f in found) for name in ("level0", "level1")}

    assert crossing(plain, 8 * WIDTH) == {"level0": 20, "level1": 4}
    assert crossing(one, ROW) == {"level0": 14, "level1": 4}
    assert crossing(two, ROW) == {"level0": 8, "level1": 10}


def test_h8_pre_reduced_output_is_the_naive_sum():
    problem = static(list(TABLE), 8)
    plain, two = run(problem, flat), run(problem, hierarchical(TINY, 2))
    worst = max(float(np.abs(a.y - b.y).max() / np.abs(a.y).max()) for a, b in zip(plain, two, strict=True))
    assert worst < 1e-15


@pytest.mark.parametrize("make", [flat, hierarchical(TINY, 1), hierarchical(TINY, 2)])
def test_h8_no_permutation_of_the_owners_changes_the_output(make: MakeTransport):
    before = run(static(list(TABLE), 8), make)
    for seed in range(4):
        table = np.random.default_rng(seed).permutation(8).reshape(4, 2)
        after = run(Problem(list(TABLE), plan_static(counts_of(list(TABLE), 8), table)), make)
        for a, b in zip(before, after, strict=True):
            np.testing.assert_allclose(a.y, b.y, rtol=0, atol=1e-13)
            np.testing.assert_allclose(a.grads[0], b.grads[0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("deduplicate", [True, False])
@pytest.mark.parametrize(
    ("units", "ranks", "depth"),
    [((1,), 4, 1), ((1, 2), 4, 1), ((1, 2), 4, 2), ((1, 2, 4), 8, 1), ((1, 2, 4), 8, 2), ((1, 2, 4), 8, 3)],
)
def test_every_depth_equals_flat(units: tuple[int, ...], ranks: int, depth: int, deduplicate: bool):
    problem = static(random_ids(3, ranks, 11, 4), 11)
    other = run(problem, hierarchical(Topology(ranks, levels(*units)), depth, deduplicate))
    assert_same(problem, run(problem, flat), other)


@pytest.mark.parametrize("deduplicate", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_bytes_of_the_exchange_are_those_that_the_collectives_moved(depth: int, deduplicate: bool):
    problem = static(random_ids(5, 8, 16, 4), 16)
    outcomes = run(problem, hierarchical(Topology(8, levels(1, 2, 4)), depth, deduplicate))
    for rank, outcome in enumerate(outcomes):
        moved = [c.bytes_sent for c in outcome.log if c.name == "all_to_all"]
        out, back = moved[: 2 * depth], moved[2 * depth :]
        assert len(back) == depth
        sent = [t.sent[rank].sum() - t.sent[rank, rank] for t in outcome.exchange.traffic]
        assert [a + b for a, b in zip(out[::2], out[1::2], strict=True)] == sent
        returned = [t.returned[rank].sum() - t.returned[rank, rank] for t in outcome.exchange.traffic]
        assert back == returned[::-1]


def test_host_copies_are_two_at_most_and_one_without_deduplication():
    problem = static(random_ids(5, 4, 8, 2), 8)
    for deduplicate, gathers in ((True, 1), (False, 0)):  # the counts of the plan are the other one
        for outcome in run(problem, hierarchical(TINY, 2, deduplicate)):
            assert sum(c.name == "gather_to_host" for c in outcome.log) == gathers


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("planner", ["least_loaded", "relayout"])
def test_experts_with_several_slots_equal_flat(planner: str, depth: int):
    ids = [np.where(i == 5, -1, np.where(i == 3, 0, i)) for i in random_ids(7, 4, 8, 3, max_tokens=12)]
    counts = counts_of(ids, 8)
    if planner == "least_loaded":
        plan = plan_least_loaded(counts, slot_table(owners(8, 4), 4), LeastLoadedOptions(min_rows=1, lambda_=None))
    else:
        options = RelayoutOptions(slots_per_rank=3)
        plan = plan_relayout(counts, candidates(counts, options)["heap"], options)
    assert not plan.one_slot_per_expert
    problem = Problem(ids, plan)
    assert_same(problem, run(problem, flat), run(problem, hierarchical(TINY, depth)))


def test_the_modelled_depth_is_the_same_on_every_rank_and_changes_nothing():
    problem = static(random_ids(2, 8, 16, 8, max_tokens=20), 16)
    topology = Topology(8, levels(1, 2, 4))
    outcomes = run(problem, hierarchical(topology, None, usual=3))
    assert {len(o.exchange.traffic) for o in outcomes} == {3}
    assert_same(problem, run(problem, flat), outcomes)


def test_other_weights_than_those_that_rode_along_are_sent_after_them():
    problem = static(random_ids(4, 4, 8, 2), 8)
    plain, two = (run(problem, make, other_weights=True) for make in (flat, hierarchical(TINY, 2)))
    assert_same(problem, plain, two)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Problem, Topology]:
    """Nested units of random sizes on up to 12 ranks; any owners; tokens for all, some or none of the ranks."""
    parts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    units = [1, *np.cumprod(parts).tolist()]
    ranks = max(2, units[-1])
    nested = sorted({u for u in units if u < ranks and ranks % u == 0})
    num_experts = draw(st.integers(ranks, 2 * ranks + 1))
    seed, most = draw(st.integers(0, 10**6)), draw(st.sampled_from([0, 1, 7]))
    ids = random_ids(seed, ranks, num_experts, draw(st.integers(1, min(4, num_experts))), most, drop=0.2)
    rng, counts = np.random.default_rng(seed), counts_of(ids, num_experts)
    home = slot_table(rng.permutation(owners(num_experts, ranks)), ranks)
    kind = draw(st.sampled_from(["static", "least_loaded", "relayout"]))
    if kind == "static":
        plan = plan_static(counts, home)
    elif kind == "least_loaded":
        plan = plan_least_loaded(counts, home, LeastLoadedOptions(min_rows=1, lambda_=None))
    else:
        options = RelayoutOptions(slots_per_rank=-(-num_experts // ranks) + 1)
        plan = plan_relayout(counts, candidates(counts, options)["heap"], options)
    return Problem(ids, plan), Topology(ranks, levels(*nested))


@settings(max_examples=30, deadline=None)
@given(problems(), st.data())
def test_any_topology_routing_owners_and_planner_equals_flat_and_moves_what_it_says(
    case: tuple[Problem, Topology], data: st.DataObject
):
    problem, topology = case
    depth, deduplicate = data.draw(st.integers(1, topology.depth)), data.draw(st.booleans())
    outcomes = run(problem, hierarchical(topology, depth, deduplicate))
    assert_same(problem, run(problem, flat), outcomes)
    for rank, outcome in enumerate(outcomes):
        traffic = outcome.exchange.traffic
        planned = sum(int(t.sent[rank].sum() + t.returned[rank].sum()) for t in traffic)
        planned -= sum(int(t.sent[rank, rank] + t.returned[rank, rank]) for t in traffic)
        assert planned == sum(c.bytes_sent for c in outcome.log if c.name == "all_to_all")
        inside = [topology.bytes_by_level(t.sent) for t in traffic]
        assert [sum(f.values()) for f in inside] == [int(t.sent.sum() - np.trace(t.sent)) for t in traffic]
        if depth > 1:  # only the first stage leaves the units of level 1
            assert all(f["level0"] == 0 for f in inside[1:])


@given(values=st.integers(1, 5000), rows=st.integers(0, 5), columns=st.integers(1, 20), seed=st.integers(0, 99))
def test_packed_integers_come_back(values: int, rows: int, columns: int, seed: int):
    x = np.random.default_rng(seed).integers(-1, values, (rows, columns))
    packed = pack(ops, ops.asarray(x), values)
    assert packed.shape == (rows, words(columns, values))
    np.testing.assert_array_equal(ops.to_numpy(unpack(ops, packed, columns, values)), x)


def test_eight_ids_of_64_slots_are_one_word():
    assert digits(64) == 10
    assert words(8, 64) == 1
    with pytest.raises(ValueError, match="fewer slots"):
        digits(2**63)
