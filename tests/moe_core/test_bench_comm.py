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


def test_a_fitted_cluster_file_is_read_back(tmp_path: Path):
    made = report({"cluster": NODES.model_dump(mode="json"), "rows": rows()}, True, 4)
    file = tmp_path / "mine.yaml"
    file.write_text(cluster_text(made["cluster"]))
    assert load_config({}, [f"cluster={file}"]).cluster == ClusterConfig.model_validate(made["cluster"])
    assert [row["level"] for row in made["fit"]] == list(TRUE)
    assert report({"cluster": {}, "rows": []}, False, 4)["fit"] == []
