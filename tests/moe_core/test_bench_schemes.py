"""bench schemes: what is counted, what is predicted, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from twinmoe.moe_core.bench_figures import figures, own_figures, predicted_seconds
from twinmoe.moe_core.bench_job import LINKS, Where
from twinmoe.moe_core.bench_schemes_request import SchemesRequest, mixed_models, run, scheme_config, table
from twinmoe.moe_core.combinations import ConfigError
from twinmoe.moe_core.layer import LayerStats
from twinmoe.moe_core.planners.static import owners, plan_static, slot_table
from twinmoe.moe_core.topology import Level, Link, Topology
from twinmoe.testing.moe_core.transport.harness import TABLE, Problem, counts_of, flat, hierarchical
from twinmoe.testing.moe_core.transport.harness import run as run_exchange

TOPOLOGY = Topology(4, (Level("cluster", 1, Link(1.0, 1e-3)), Level("node", 2, Link(0.1, 1e-4), Link(0.5, 1e-3))))
ROW = 8 * 6


def figures_of(make: Any) -> dict[str, Any]:
    plan = plan_static(counts_of(list(TABLE), 8), slot_table(owners(8, 4), 4))
    outcome = run_exchange(Problem(list(TABLE), plan), make)[0]
    stats = LayerStats(None, None, plan, outcome.exchange)
    of_ranks = np.stack([own_figures(stats, TOPOLOGY, rank, ROW, plan) for rank in range(4)])
    return {**figures(of_ranks, TOPOLOGY, True), "predicted": predicted_seconds(stats, TOPOLOGY)}


def test_figures_of_the_sheets_table():
    plain = figures_of(flat)
    assert (plain["rows_crossing_nodes"], plain["predicted_ceiling"], plain["busiest_rank_rows"]) == (20, 1.0, 9)
    assert plain["bytes_per_level"] == {"node": 2 * 4 * ROW, "cluster": 2 * 20 * ROW}
    assert plain["predicted"] == pytest.approx(2 * (1.0 + 9 * ROW * 1e-3))  # ranks 2 and 3 receive 9 rows
    deep = figures_of(hierarchical(TOPOLOGY, 2))
    assert deep["rows_crossing_nodes"] == 8
    metadata = 8 * 4 + 8
    assert deep["bytes_per_level"]["cluster"] == 2 * 8 * ROW + 8 * metadata
    assert deep["predicted_ceiling"] == pytest.approx(2 * 20 * ROW / (16 * ROW + 8 * metadata), abs=1e-3)
    assert deep["rows_ceiling"] == 1.0


def test_bytes_inside_a_tensor_group_are_in_the_figures_and_in_the_modelled_time():
    plan = plan_static(counts_of(list(TABLE), 8), slot_table(owners(8, 4), 4))
    outcome = run_exchange(Problem(list(TABLE), plan), flat)[0]
    stats = LayerStats(None, None, plan, replace(outcome.exchange, tensor_bytes=(300, 700)))
    of_ranks = np.stack([own_figures(stats, TOPOLOGY, rank, ROW, plan) for rank in range(4)])
    assert figures(of_ranks, TOPOLOGY, True)["bytes_per_level"]["tensor"] == 4000
    without = predicted_seconds(stats, TOPOLOGY)
    pair = Topology(2, (Level("node", 1, Link(0.1, 1e-4)),))
    assert predicted_seconds(stats, TOPOLOGY, pair) == pytest.approx(without + 3 * 0.1 + 2 * 1000 * 1e-4)
    measured = (("all_gather", Link(0.2, 1e-3)), ("all_reduce", Link(0.3, 1e-2)))
    pair = Topology(2, (Level("node", 1, Link(0.1, 1e-4), collectives=measured),))
    assert predicted_seconds(stats, TOPOLOGY, pair) == pytest.approx(without + 3 * 0.2 + 1000 * 1e-3)
    summed = replace(stats, exchange=replace(outcome.exchange, tensor_bytes=(0, 700)))
    assert predicted_seconds(summed, TOPOLOGY, pair) == pytest.approx(without + 0.3 + 700 * 1e-2)


def test_schemes_take_settings_and_wrong_ones_are_refused_before_a_job_starts():
    request = SchemesRequest(Where(nproc="2"))
    config = scheme_config("hiermoe,placement=fixed,deduplicate=false", request)
    assert (config.parallel.transport, config.parallel.placement, config.parallel.deduplicate) == (
        "hierarchical_dedup",
        "fixed",
        False,
    )
    assert config.moe.num_experts == 32
    for scheme, told in (("nosuch", "nosuch"), ("ep,placement", "key=value"), ("ep,residency=borrowed", "not combine")):
        with pytest.raises(ConfigError, match=told):
            scheme_config(scheme, request)
    with pytest.raises(ConfigError, match="hot experts"):
        run(SchemesRequest(Where(nproc="2"), skews=("hot:95:2",), top_ks=(4,)))


def test_a_link_class_is_for_nvidia_gpus_and_reaches_their_workers():
    for link, told in (("infiniband", "choose one of nvlink, shared_memory, socket"), ("socket", "leave --link out")):
        with pytest.raises(ConfigError, match=told):
            run(SchemesRequest(Where(nproc="2", backend="cpu", link=link)))
    cuda = pytest.importorskip("twinmoe.cuda.backend")
    assert tuple(cuda.LINKS) == LINKS
    assert cuda.worker_environment({}) == {}
    assert cuda.worker_environment({"link": "shared_memory"}) == {"NCCL_P2P_DISABLE": "1"}
    assert cuda.worker_environment({"link": "socket"})["NCCL_SOCKET_IFNAME"] == "lo"


def test_rows_of_different_models_are_marked():
    rows = [
        {"scheme": "ep", "top_k": 2, "skew": "balanced", "model_hash": "a", "layer_milliseconds": 8.0},
        {"scheme": "other", "top_k": 2, "skew": "balanced", "model_hash": "b", "layer_milliseconds": 4.0},
    ]
    assert mixed_models(rows)
    assert not mixed_models(rows[:1])
    shown = table(rows)
    assert [r["scheme"] for r in shown] == ["ep", "other (another model)"]
    assert [r["speed_up"] for r in shown] == [1.0, 2.0]


@pytest.mark.processes
def test_a_small_run_on_two_ranks_reports_every_key():
    request = SchemesRequest(
        Where(nproc="2", backend="cpu"),
        schemes=("ep", "llep,least_loaded.min_rows=1", "hiermoe"),
        skews=("hot:100:4",),
        num_experts=8,
        hidden_size=16,
        expert_hidden_size=16,
        tokens=32,
        repeats=2,
    )
    report = run(request)
    assert [row["scheme"] for row in report["rows"]] == list(request.schemes)
    assert len({row["model_hash"] for row in report["rows"]}) == 1
    for row in report["rows"]:
        assert row["layer_milliseconds"] > 0
        assert row["step_milliseconds"] >= row["layer_milliseconds"]
        assert set(row) >= {"bytes_per_level", "rows_crossing_nodes", "peak_memory_bytes", "predicted_ceiling"}
    plain, spread, _ = report["rows"]
    assert plain["busiest_rank_rows"] == 2 * 2 * 32
    assert spread["busiest_rank_rows"] == 2 * 32
    assert spread["predicted_ceiling"] == 2.0
    assert np.isclose(plain["predicted_ceiling"], 1.0)
