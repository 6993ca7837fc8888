"""The simulator's exchanges are those that ranks run, its samples scale, and HierMoE's sheet comes out (H5)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from twinmoe.moe_core.compose import load_config
from twinmoe.moe_core.plan import Plan, destinations
from twinmoe.moe_core.planners.least_loaded import LeastLoadedOptions, plan_least_loaded
from twinmoe.moe_core.planners.static import owners, plan_static, slot_table
from twinmoe.moe_core.simulate_exchange import (
    Load,
    Route,
    RowSize,
    all_to_all_seconds,
    hits,
    passes,
    sample_destinations,
    traffic,
)
from twinmoe.moe_core.synthetic import Skew, choose
from twinmoe.moe_core.topology import Level, Link, Topology, topology_of
from twinmoe.moe_core.transport.depth import level_units
from twinmoe.testing.moe_core.transport import harness
from twinmoe.testing.moe_core.transport.harness import WIDTH, Problem, counts_of, levels, random_ids

SIZE = RowSize(WIDTH, 8, 8)
"""Of the harness: float64."""


def load_of(ids: list[np.ndarray], num_experts: int, every: int = 1) -> Load:
    """Exact counts; every n-th token in the sample."""
    sample = np.concatenate([i[::every] for i in ids])
    source = np.concatenate([np.full(len(i[::every]), r) for r, i in enumerate(ids)])
    return Load(counts_of(ids, num_experts), sample, source)


def plan_of(counts_RE: np.ndarray, spilled: bool) -> Plan:
    ranks, experts = counts_RE.shape
    table = slot_table(owners(experts, ranks), ranks)
    if not spilled:
        return plan_static(counts_RE, table)
    return plan_least_loaded(counts_RE, table, LeastLoadedOptions(lambda_=None, min_rows=1))


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_destinations_of_a_complete_sample_are_those_of_the_plan(seed: int, spilled: bool):
    ids = random_ids(seed, 4, 8, 3, max_tokens=20)
    load = load_of(ids, 8)
    plan = plan_of(load.counts_RE, spilled)
    expected = np.concatenate([destinations(plan, r, i.reshape(-1)) for r, i in enumerate(ids)])
    np.testing.assert_array_equal(sample_destinations(plan, load).reshape(-1), expected)


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize(
    ("depth", "deduplicate"), [(1, True), (2, True), (3, True), (1, False), (2, False), (3, False)]
)
def test_traffic_is_that_of_the_exchange_that_ranks_ran(depth: int, deduplicate: bool, spilled: bool):
    topology = Topology(8, levels(1, 2, 4))
    ids = random_ids(depth, 8, 16, 3, max_tokens=12)
    load = load_of(ids, 16)
    problem = Problem(ids, plan_of(load.counts_RE, spilled))
    ran = harness.run(problem, harness.hierarchical(topology, depth, deduplicate))[0].exchange.traffic
    route = Route("hierarchical_dedup", depth, deduplicate, experts=16)
    simulated = traffic(problem.plan, load, route, topology, SIZE)
    assert len(simulated) == len(ran) == depth
    for mine, theirs in zip(simulated, ran, strict=True):
        assert mine.level == theirs.level
        np.testing.assert_array_equal(mine.sent, theirs.sent)
        np.testing.assert_array_equal(mine.returned, theirs.returned)


def test_flat_traffic_is_that_of_the_exchange_that_ranks_ran():
    ids = random_ids(5, 4, 8, 2, max_tokens=12)
    load = load_of(ids, 8)
    problem = Problem(ids, plan_of(load.counts_RE, True))
    (ran,) = harness.run(problem, harness.flat)[0].exchange.traffic
    (mine,) = traffic(problem.plan, load, Route("flat"), Topology(4, levels(1)), SIZE)
    np.testing.assert_array_equal(mine.sent, ran.sent)


def test_an_automatic_depth_is_the_one_that_ranks_choose():
    topology = topology_of(load_config({"cluster": "a6000_4x8"}).cluster, [list(range(8))])
    for tokens in (3, 40):
        ids = [choose(Skew.parse("balanced"), 16, tokens, 4, r) for r in range(8)]
        load = load_of(ids, 16)
        problem = Problem(ids, plan_of(load.counts_RE, False))
        make: Any = harness.hierarchical(topology, None, usual=1)
        ran = harness.run(problem, make)[0].exchange.traffic
        route = Route("hierarchical_dedup", None, experts=16, tokens=1)  # few tokens: the usual depth is 1
        assert len(traffic(problem.plan, load, route, topology, SIZE)) == len(ran)


@pytest.mark.parametrize("skew", ["balanced", "zipf:1", "groups:4:2"])
def test_a_sample_of_4096_tokens_gives_hits_within_two_percent(skew: str):
    ranks, experts = 16, 64
    ids = [choose(Skew.parse(skew), experts, 2048, 6, r) for r in range(ranks)]
    whole, part = load_of(ids, experts), load_of(ids, experts, every=8)
    assert len(part.ids_SK) == 4096
    assert whole.complete()
    assert not part.complete()
    plan = plan_of(whole.counts_RE, False)
    units = level_units(Topology(ranks, levels(1, 4)))
    for exact, scaled in zip(hits(plan, whole, units), hits(plan, part, units), strict=True):
        assert abs(scaled.sum() / exact.sum() - 1) < 0.005
        assert np.abs(scaled.sum(0) / exact.sum(0) - 1).max() < 0.02


def qwen3() -> tuple[Load, Topology]:
    """H5: E=128, K=8, 1024 tokens a rank on 4 nodes x 2 sockets x 2 islands x 2 cards, all tokens in the sample."""
    topology = topology_of(load_config({"cluster": "a6000_4x8"}).cluster, [list(range(32))])
    ids = [choose(Skew.parse("balanced"), 128, 1024, 8, r) for r in range(32)]
    return load_of(ids, 128), topology


def seconds_of(load: Load, topology: Topology, depth: int, deduplicate: bool = True) -> float:
    """Rows alone, as the sheet counts: no ids, no weights."""
    plan = plan_of(load.counts_RE, False)
    moved = traffic(plan, load, Route("hierarchical_dedup", depth, deduplicate), topology, RowSize(2048, 2))
    return sum(all_to_all_seconds(t.returned.T, topology, n, depth) for n, t in enumerate(moved, 1))


def test_h5_times_and_depth_of_qwen3_on_four_nodes():
    """18.32 / 13.04 / 12.40 / 12.90 ms: from whole id sets, whose busiest link exceeds the even one by some percent."""
    load, topology = qwen3()
    times = [1e3 * seconds_of(load, topology, d) for d in (1, 2, 3, 4)]
    np.testing.assert_allclose(times, [18.32, 13.04, 12.40, 12.90], rtol=0.03)
    assert int(np.argmin(times)) + 1 == 3


def test_h5_without_deduplication_depth_1_is_best():
    load, topology = qwen3()
    times = [1e3 * seconds_of(load, topology, d, deduplicate=False) for d in (1, 2, 3, 4)]
    np.testing.assert_allclose(times, [19.85, 23.08, 23.47, 24.07], rtol=0.03)
    assert int(np.argmin(times)) == 0


def test_equal_blocks_cost_what_the_line_says_on_own_and_shared_links():
    line, inner = Link(1e-3, 1e-8), Link(1e-4, 1e-9)
    for shared in (False, True):
        topology = Topology(4, (Level("cluster", 1, line, shared=shared), Level("node", 2, inner, line)))
        equal = np.full((4, 4), 1000)
        assert all_to_all_seconds(equal, topology, 1, 1) == pytest.approx(line.seconds(4000))
        rails = np.kron(np.ones((2, 2)), np.eye(2)) * 1000
        assert all_to_all_seconds(rails, topology, 1, 2) == pytest.approx(line.seconds(2000))
        inside = np.kron(np.eye(2), np.ones((2, 2))) * 1000
        assert all_to_all_seconds(inside, topology, 2, 2) == pytest.approx(inner.seconds(2000))


def test_a_busy_rank_costs_less_where_its_node_shares_the_link():
    line = Link(0.0, 1e-8)
    to_rank_0 = np.zeros((4, 4))
    to_rank_0[:, 0] = 1000

    def seconds(shared: bool) -> float:
        topology = Topology(4, (Level("cluster", 1, line, shared=shared), Level("node", 2, Link(), line)))
        return all_to_all_seconds(to_rank_0, topology, 1, 1)

    assert seconds(False) == pytest.approx(4000e-8)  # 2000 bytes come over a link made for half of a rank's
    assert seconds(True) == pytest.approx(2000e-8)


def test_a_step_has_two_exchanges_each_way():
    load, topology = (
        load_of(random_ids(1, 4, 8, 2, max_tokens=30), 8),
        Topology(4, (Level("host", 1, Link(1e-4, 1e-9)),)),
    )
    moved = traffic(plan_of(load.counts_RE, False), load, Route("flat"), topology, SIZE)
    found = passes(moved, topology)
    assert found.dispatch == pytest.approx(found.combine_back)
    assert found.combine == pytest.approx(found.dispatch_back)
    assert found.total == pytest.approx(2 * (found.dispatch + found.combine))
