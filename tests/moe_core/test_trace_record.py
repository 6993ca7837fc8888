"""Recording: a replayed trace gives the very plans of the run, under planners with and without memory."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from twinmoe.backends.reference import ops
from twinmoe.backends.reference.comm import Communicator, run_ranks
from twinmoe.backends.reference.tape import variable
from twinmoe.moe_core.build import LayerSpec, build_layer, make_runtime
from twinmoe.moe_core.combinations import ConfigError, mesh_of
from twinmoe.moe_core.compose import load_config
from twinmoe.moe_core.config import Config
from twinmoe.moe_core.plan import Plan
from twinmoe.moe_core.planners.static import owners, plan_static, slot_table
from twinmoe.moe_core.routing.base import Memo, Tokens
from twinmoe.moe_core.simulate_exchange import Load
from twinmoe.moe_core.simulate_layer import LayerRun, site_of
from twinmoe.moe_core.simulate_rates import rates_of_teraflops, shape_of
from twinmoe.moe_core.synthetic import ScriptedRouter, Skew, choose
from twinmoe.moe_core.trace import Trace, read
from twinmoe.moe_core.trace_record import counts_of, recorder_of

STEPS, TOKENS, WIDTH = 4, 24, 6


def config_of(scheme: str, ranks: int) -> Config:
    words = [f"parallel.scheme={scheme}", "moe.num_experts=8", "moe.top_k=2", "moe.expert_hidden_size=4"]
    words += [f"model.hidden_size={WIDTH}", "model.num_attention_heads=1", "train.trace_every=1"]
    return load_config({}, [*words, f"parallel.expert_parallel_size={ranks}", "parallel.least_loaded.min_rows=1"])


def ids_of(step: int, rank: int) -> np.ndarray:
    return choose(Skew.parse("zipf:1.2"), 8, TOKENS, 2, 100 * step + rank)


def trained(config: Config, ranks: int, world: int, run_dir: Path) -> list[list[Plan]]:
    """The plans of STEPS steps of one layer on each rank, recorded in run_dir."""

    def body(comm: Communicator) -> list[Plan]:
        runtime = make_runtime(ops, comm, mesh_of(config, world), config.parallel, config.cluster)
        recorder = recorder_of(config, runtime, run_dir)
        assert recorder is not None
        plans, layer = [], None
        for step in range(STEPS):
            router = ScriptedRouter(ops, WIDTH, 2, ids_of(step, comm.rank))
            parts = build_layer(config.moe, config.parallel, runtime, LayerSpec(WIDTH, "moe.", router=router))
            layer = parts.layer if layer is None else type(layer)(**{**_fields(layer), "router": router})
            params = {p.name[4:]: variable(p.initial()) for p in parts.parameters}
            tokens = Tokens(sequences=1, total=float(TOKENS * ranks))
            x_TD = variable(np.random.default_rng(comm.rank).standard_normal((TOKENS, WIDTH)))
            stats = layer(params, x_TD, tokens, Memo()).stats
            assert stats is not None
            plans.append(stats.plan)
            recorder.add([stats])
            recorder.end_step(step)
        recorder.close()
        return plans

    return run_ranks(world, body)


def _fields(layer: Any) -> dict[str, Any]:
    return {f.name: getattr(layer, f.name) for f in fields(layer)}


def replayed(config: Config, ranks: int, trace: Trace) -> list[Plan]:
    site = site_of(config, mesh_of(config, ranks), rates_of_teraflops(1.0, shape_of(config, 4)), shape_of(config, 4))
    run = LayerRun(config, site)
    records = [trace.records[step, 0, 0] for step in trace.steps]
    return [run.plan(Load(r.counts_RE.astype(np.int64), r.ids_SK, r.source_S)) for r in records]


@pytest.mark.parametrize("scheme", ["ep", "llep", "laer", "fsdp_ep"])
def test_a_recorded_trace_replays_to_identical_plans(tmp_path: Path, scheme: str):
    config = config_of(scheme, 4)
    plans = trained(config, 4, 4, tmp_path)[0]
    trace = read(tmp_path)
    again = replayed(config, 4, trace)
    assert len(again) == len(plans) == STEPS
    for a, b in zip(plans, again, strict=True):
        for name in ("slots", "weight_from", "flow", "round"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        for one, other in zip(a.order, b.order, strict=True):
            np.testing.assert_array_equal(one, other)


def test_the_sample_is_what_ranks_chose(tmp_path: Path):
    trained(config_of("ep", 4), 4, 4, tmp_path)
    record = read(tmp_path).records[2, 0, 0]
    for rank in range(4):
        np.testing.assert_array_equal(record.ids_SK[record.source_S == rank], ids_of(2, rank))


def test_groups_write_a_file_each_and_are_read_as_one(tmp_path: Path):
    trained(config_of("ep", 2), 2, 4, tmp_path)
    assert len(list((tmp_path / "trace").iterdir())) == 2
    record = read(tmp_path).records[1, 0, 0]
    expected = np.stack([np.bincount(ids_of(1, r).reshape(-1), minlength=8) for r in range(4)])
    np.testing.assert_array_equal(record.counts_RE, expected)


def test_counts_are_those_that_the_plan_was_made_from():
    counts = np.random.default_rng(0).integers(0, 9, (4, 8))
    plan = plan_static(counts, slot_table(owners(8, 4), 4))
    np.testing.assert_array_equal(counts_of(plan, 8), counts)


def test_layers_of_several_heads_are_refused():
    words = ["moe.num_heads=2", "moe.head_dim=4", "train.trace_every=1"]
    with pytest.raises(ConfigError, match="trace_every"):
        recorder_of(load_config({}, words), None, Path())  # type: ignore[arg-type]
