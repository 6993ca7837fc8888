"""bench comm: lines through measurements, and the cluster file that they make."""

from __future__ import annotations

from pathlib import Path

import pytest
from twinmoe.moe_core.bench_comm import cluster_text, fit, fit_line, fitted_cluster, report
from twinmoe.moe_core.compose import load_config
from twinmoe.moe_core.config import ClusterConfig, LevelConfig
from twinmoe.moe_core.topology import topology_of

NODES = ClusterConfig(name="two_nodes", levels=(LevelConfig(name="node", size=2), LevelConfig(name="cluster")))
TRUE = {"cluster": (2e-3, 4e-8), "node rails": (1e-3, 5e-8), "node": (5e-4, 1e-9)}


def rows() -> list[dict[str, object]]:
    return [
        {"collective": "all_to_all", "level": level, "bytes": n, "milliseconds": 1e3 * (alpha + n * beta)}
        for level, (alpha, beta) in TRUE.items()
        for n in (1 << 16, 1 << 20, 1 << 22)
    ]


def test_a_line_is_found_exactly_and_never_falls():
    alpha, beta, r2 = fit_line([1e4, 1e5, 1e6], [0.01, 0.1, 1.0])
    assert (alpha, beta, r2) == (pytest.approx(0, abs=1e-12), pytest.approx(1e-6), pytest.approx(1.0))
    alpha, beta, _ = fit_line([1e4, 1e5], [2.0, 1.0])
    assert (alpha > 0, beta) == (True, 0.0)


def test_the_fit_of_every_level_reaches_the_topology():
    fits = fit(rows())
    assert {f.level: (f.alpha, f.beta) for f in fits} == {k: pytest.approx(v) for k, v in TRUE.items()}
    assert all(f.r2 == pytest.approx(1.0) for f in fits)
    topology = topology_of(fitted_cluster(NODES, fits, 4), [list(range(4))])
    assert topology.link(1, 1).beta == pytest.approx(4e-8)
    assert topology.link(1, 2).beta == pytest.approx(5e-8)
    assert topology.link(2, 2).beta == pytest.approx(1e-9)


def test_lines_of_other_collectives_are_in_the_file_and_reach_the_topology(tmp_path: Path):
    more = [{**row, "collective": "all_gather", "milliseconds": 2 * row["milliseconds"]} for row in rows()]  # type: ignore[operator]
    made = report({"cluster": NODES.model_dump(mode="json"), "rows": rows() + more}, True, 4)
    file = tmp_path / "mine.yaml"
    file.write_text(cluster_text(made["cluster"]))
    cluster = load_config({}, [f"cluster={file}"]).cluster
    assert cluster == ClusterConfig.model_validate(made["cluster"])
    node, whole = cluster.levels
    assert (node.collectives[0].rail_beta, whole.collectives[0].rail_beta) == (None, pytest.approx(1e-7))
    pair = topology_of(cluster, [[0, 1], [2, 3]])
    line = pair.levels[0].collective("all_gather")
    assert line is not None
    assert (line.alpha, line.beta) == (pytest.approx(1e-3), pytest.approx(2e-9))
    assert pair.levels[0].collective("all_reduce") is None


def test_a_rail_that_costs_nothing_to_start_stays_so_in_the_file(tmp_path: Path):
    level = LevelConfig(name="cluster", alpha=1e-3, beta=1e-8, rail_alpha=0.0, rail_beta=2e-8)
    file = tmp_path / "mine.yaml"
    file.write_text(cluster_text({"name": "mine", "levels": [level.model_dump()]}))
    assert load_config({}, [f"cluster={file}"]).cluster.levels == (level,)


def test_a_fitted_cluster_file_is_read_back(tmp_path: Path):
    made = report({"cluster": NODES.model_dump(mode="json"), "rows": rows()}, True, 4)
    file = tmp_path / "mine.yaml"
    file.write_text(cluster_text(made["cluster"]))
    assert load_config({}, [f"cluster={file}"]).cluster == ClusterConfig.model_validate(made["cluster"])
    assert [row["level"] for row in made["fit"]] == list(TRUE)
    assert report({"cluster": {}, "rows": []}, False, 4)["fit"] == []
