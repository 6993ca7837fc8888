"""Levels of a group of ranks: which fit, who is together, whose bytes cross what."""

from __future__ import annotations

import numpy as np
import pytest
from twinmoe.backends.protocol import Launch
from twinmoe.moe_core.compose import load_config
from twinmoe.moe_core.config import ClusterConfig, LevelConfig
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.topology import Level, Link, Topology, cluster_of_launch, flat_topology, topology_of
from twinmoe.moe_core.transport.depth import usual_depth

A6000 = ClusterConfig(
    name="test",
    levels=(
        LevelConfig(name="island", size=2, alpha=7),
        LevelConfig(name="socket", size=4, alpha=5, rail_alpha=6),
        LevelConfig(name="node", size=8, alpha=3, rail_alpha=4),
        LevelConfig(name="cluster", alpha=1, rail_alpha=2),
    ),
)


def test_four_nodes_of_eight_cards_have_the_papers_units():
    topology = topology_of(A6000, [list(range(32))])
    assert topology.units == (1, 4, 8, 16)
    assert topology.depth == 4
    assert [level.name for level in topology.levels] == ["cluster", "node", "socket", "island"]
    assert [level.within.alpha for level in topology.levels] == [1, 3, 5, 7]
    assert [level.rails.alpha for level in topology.levels[1:]] == [2, 4, 6]
    assert topology.unit_of(1).tolist() == [0] * 8 + [1] * 8 + [2] * 8 + [3] * 8


def test_links_and_names_of_stages():
    topology = topology_of(A6000, [list(range(32))])
    assert [topology.link(s, 3).alpha for s in (1, 2, 3)] == [2, 4, 5]
    assert [topology.stage_name(s, 3) for s in (1, 2, 3)] == ["node rails", "socket rails", "socket"]
    assert topology.link(1, 1).alpha == 1
    assert topology.stage_name(1, 1) == "flat"
    assert [topology.fan(s, 3) for s in (1, 2, 3)] == [(1, 4), (4, 8), (8, 32)]


def test_groups_inside_a_node_see_only_what_is_inside():
    topology = topology_of(A6000, Mesh.over(32, expert=8).partition("expert"))
    assert topology.units == (1, 2, 4)
    assert [level.name for level in topology.levels] == ["node", "socket", "island"]


def test_tensor_ranks_halve_the_units():
    groups = Mesh.over(32, expert=16, tensor=2).partition("expert")
    assert topology_of(A6000, groups).units == (1, 4, 8)
    assert topology_of(A6000, groups).levels[-1].name == "socket"


def test_levels_that_cut_unevenly_are_left_out():
    cluster = ClusterConfig(levels=(LevelConfig(name="node", size=4), LevelConfig(name="cluster")))
    assert topology_of(cluster, [list(range(6))]).units == (1,)
    assert topology_of(cluster, [[0, 4, 1, 5]]).units == (1,)
    assert topology_of(cluster, [[0, 1, 4, 5], [2, 3, 6, 7]]).units == (1, 2)
    assert topology_of(cluster, [[0, 1], [2, 4]]).units == (1,)


def test_bytes_by_level_name_the_smallest_unit_that_holds_both():
    topology = Topology(4, (Level("cluster", 1), Level("node", 2)))
    sent = np.arange(16).reshape(4, 4)
    assert topology.bytes_by_level(sent) == {"node": 1 + 4 + 11 + 14, "cluster": 2 + 3 + 6 + 7 + 8 + 9 + 12 + 13}


def test_units_must_nest():
    with pytest.raises(ValueError, match="each number must divide the next"):
        Topology(8, (Level("a", 1), Level("b", 4), Level("c", 6)))
    with pytest.raises(ValueError, match="one unit with all ranks"):
        Topology(8, (Level("a", 2),))
    assert flat_topology(3).units == (1,)


def test_a_launcher_tells_of_nodes_where_the_file_does_not():
    launch = Launch(rank=0, size=4, local_size=2)
    assert topology_of(cluster_of_launch(launch, ClusterConfig()), [list(range(4))]).units == (1, 2)
    assert cluster_of_launch(launch, A6000) is A6000
    assert cluster_of_launch(Launch(size=4, local_size=4), ClusterConfig()) == ClusterConfig()


def test_a_link_is_a_line():
    assert Link(2.0, 0.5).seconds(10) == 7.0


def test_the_packaged_a6000_cluster_chooses_three_stages_for_qwen3_as_the_sheet_does():
    cluster = load_config({}, ["cluster=a6000_4x8"]).cluster
    topology = topology_of(cluster, [list(range(32))])
    assert topology.units == (1, 4, 8, 16)
    assert usual_depth(topology, 128, 8, 1024, 4096) == 3
    assert usual_depth(topology, 128, 2, 1024, 4096) == 1
