"""Volumes, times and the choice of depth: the sheet's H3 to H6."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from twinmoe.moe_core.synthetic import Skew, choose
from twinmoe.moe_core.topology import Level, Link, Topology
from twinmoe.moe_core.transport.depth import (
    balanced_rows,
    choose_depth,
    expected_groups,
    message_rows,
    seconds,
    stages,
    usual_depth,
)
from twinmoe.testing.moe_core.transport.harness import TABLE, levels

MS = 1e-3
A6000 = Topology(
    32,
    (
        Level("cluster", 1, Link(0.722 * MS, 5.70e-7 * MS)),
        Level("node", 4, Link(0.571 * MS, 1.27e-7 * MS), Link(0.497 * MS, 5.29e-7 * MS)),
        Level("socket", 8, Link(0.114 * MS, 2.63e-8 * MS), Link(0.301 * MS, 1.17e-7 * MS)),
        Level("island", 16, Link(0.204 * MS, 1.64e-8 * MS), Link(0.149 * MS, 2.06e-8 * MS)),
    ),
)
"""Figure 9 of the paper: milliseconds and bytes."""
ROW = 2 * 2048


def hits_of(ids: np.ndarray, num_experts: int, topology: Topology) -> list[np.ndarray]:
    """ids (R, T, K) -> tokens per source and unit, at every level."""
    found = []
    for units in (*topology.units, topology.ranks):
        unit = ids * units // num_experts
        found.append(np.stack([(unit == u).any(2).sum(1) for u in range(units)], 1))
    return found


def test_h3_expected_distinct_groups():
    expected = {(256, 4, 8): 3.6142, (256, 32, 8): 7.2668, (128, 4, 8): 3.6290, (128, 32, 8): 7.3594}
    expected |= {(8, 2, 4): 1.9714, (8, 4, 4): 3.1429, (64, 1, 8): 1.0, (64, 64, 8): 8.0}
    for (num_experts, groups, top_k), value in expected.items():
        assert expected_groups(num_experts, groups, top_k) == pytest.approx(value, abs=5e-5)
    assert 1 - expected_groups(256, 4, 8) / 8 == pytest.approx(0.548, abs=5e-4)
    by_groups = [expected_groups(64, r, 4) for r in (1, 2, 4, 8, 16, 32, 64)]
    by_choices = [expected_groups(64, 8, k) for k in range(1, 64)]
    assert sorted(by_groups) == by_groups
    assert sorted(by_choices) == by_choices


def test_h4_coarse_hits_lie_between_the_largest_and_the_sum_of_the_fine_ones():
    rng = np.random.default_rng(0)
    topology = Topology(8, levels(1, 2, 4))
    ids = np.argsort(rng.random((8, 64, 16)), axis=2)[:, :, :4]
    hits = hits_of(ids, 16, topology)
    for coarse, fine in pairwise(hits):
        children = fine.reshape(8, coarse.shape[1], -1)
        assert (children.max(2) <= coarse).all()
        assert (coarse <= children.sum(2)).all()
    single = np.stack([(ids == e).any(2).sum(1) for e in range(16)], 1)
    assert int(single.sum()) == 8 * 64 * 4
    table = np.array([(0, 4)] * 3 + [(1, 5)] * 2 + [(2, 6), (3, 7)])[None]
    _, nodes, ranks = hits_of(table, 8, Topology(4, levels(1, 2)))
    assert (ranks[0].tolist(), nodes[0].tolist()) == ([5, 2, 5, 2], [7, 7])


def test_h5_volumes_times_and_depth_of_qwen3_on_four_nodes():
    tokens, num_experts = 1024, 128

    def rows(depth: int, top_k: int, deduplicate: bool = True) -> list[float]:
        parts = [A6000.fan(n, depth)[1] for n in range(1, depth + 1)]
        return [tokens * (expected_groups(num_experts, p, top_k) if deduplicate else top_k) for p in parts]

    megabytes = [[round(n * ROW / 1e6, 2) for n in rows(d, 8)] for d in (1, 2, 3, 4)]
    assert megabytes == [[30.87], [15.22, 30.87], [15.22, 22.39, 30.87], [15.22, 22.39, 27.67, 30.87]]

    assert {round(n * ROW / 1e6, 2) for d in (1, 2, 3, 4) for n in rows(d, 8, False)} == {33.55}

    def times(*args: object) -> list[float]:
        return [round(seconds(A6000, d, rows(d, *args), ROW) / MS, 2) for d in (1, 2, 3, 4)]  # type: ignore[arg-type]

    assert times(8) == [18.32, 13.04, 12.40, 12.90]
    assert times(8, False) == [19.85, 23.08, 23.47, 24.07]
    assert times(2) == [5.45, 6.02, 5.95, 6.27]
    assert usual_depth(A6000, num_experts, 8, tokens, ROW) == 3
    assert usual_depth(A6000, num_experts, 2, tokens, ROW) == 1
    assert usual_depth(A6000, num_experts, 8, 8, ROW) == 1


def test_h5_rows_per_level_are_those_of_the_global_counts():
    topology = Topology(8, levels(1, 2, 4))
    ids = np.argsort(np.random.default_rng(1).random((8, 64, 16)), axis=2)[:, :, :4]
    hits = hits_of(ids, 16, topology)
    made = stages(topology, 3, hits)
    assert [int(s.rows.sum()) for s in made] == [int(h.sum()) for h in hits[1:]]
    for stage, balanced in zip(made, balanced_rows(topology, 3, hits), strict=True):
        assert balanced <= message_rows(stage) < 1.4 * balanced
    assert len({message_rows(stages(topology, d, hits)[-1]) // 8 > 0 for d in (1, 2, 3)}) == 1
    assert balanced_rows(topology, 1, hits)[-1] == balanced_rows(topology, 3, hits)[-1]


def test_h6_message_size_of_rank_3():
    topology = Topology(4, levels(1, 2))
    hits = hits_of(TABLE, 8, topology)
    (only,) = stages(topology, 1, hits)
    first, second = stages(topology, 2, hits)
    assert only.rows[3].tolist() == [2, 2, 1, 2]
    assert [s.fan * s.rows[3].max() for s in (only, first, second)] == [8, 4, 8]
    assert [s.peers(3).tolist() for s in (only, first, second)] == [[0, 1, 2, 3], [1, 3], [2, 3]]


@pytest.mark.parametrize(
    ("nodes", "num_experts", "groups", "used", "top_k", "ceiling"),
    [(2, 64, 4, 2, 8, 4.8), (2, 64, 4, 1, 8, 8.0), (4, 64, 8, 2, 8, 4.3077), (4, 64, 8, 4, 8, 2.5455)],
)
def test_group_limited_choices_have_a_byte_ceiling_of_their_own(
    nodes: int, num_experts: int, groups: int, used: int, top_k: int, ceiling: float
):
    """A token that uses `used` of `groups` groups hits as many nodes as that many experts drawn from `groups` would,
    at most: top_k over that is what deduplication can save of the copies between nodes."""
    expected = expected_groups(groups, nodes, used)
    assert top_k / expected == pytest.approx(ceiling, abs=5e-5)
    ids = choose(Skew.parse(f"groups:{groups}:{used}"), num_experts, 4000, top_k, 0)
    hit = np.stack([(ids * nodes // num_experts == n).any(1) for n in range(nodes)], 1).sum(1).mean()
    assert hit <= expected * 1.02
    assert hit == pytest.approx(expected, rel=0.06)
    free = expected_groups(num_experts, nodes, top_k)
    assert hit < free


def test_the_depth_follows_the_model_and_keeps_the_usual_one_within_the_margin():
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((32, 512, 128)), axis=2)[:, :, :8]
    hits = hits_of(ids, 128, A6000)
    assert choose_depth(A6000, hits, ROW, usual=1) == 3
    assert choose_depth(A6000, hits, ROW, usual=4, margin=0.2) == 4
    assert choose_depth(A6000, [h // 64 for h in hits], ROW, usual=3) == 1
    unmeasured = Topology(32, levels(1, 4))
    assert choose_depth(unmeasured, hits_of(ids, 128, unmeasured), ROW, usual=2) == 2
