"""Simulated steps: what schemes promise comes out, groups that are alike are simulated once, memory follows rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from twinmoe.moe_core.combinations import ConfigError, mesh_of
from twinmoe.moe_core.compose import load_config
from twinmoe.moe_core.config import Config
from twinmoe.moe_core.planners.skew import balanced, skewed_counts
from twinmoe.moe_core.simulate import Choices, StepCost, Task, simulate
from twinmoe.moe_core.simulate_rates import Line, Rates, rates_of_bench, rates_of_teraflops, shape_of
from twinmoe.moe_core.simulate_trace import alike, on_ranks, scaled_to, source_of
from twinmoe.moe_core.synthetic import Skew
from twinmoe.moe_core.trace import Record
from twinmoe.moe_core.trace_make import Synthetic, record_trace

LEVELS = [
    {"name": "node", "size": 4, "alpha": 1e-5, "beta": 1e-11},
    {"name": "cluster", "size": None, "alpha": 3e-5, "beta": 1e-10},
]


def config_of(scheme: str, *words: str, ranks: int = 8) -> Config:
    base: dict[str, Any] = {"cluster": {"name": "test", "levels": LEVELS}}
    sizes = ["model.hidden_size=512", "model.num_layers=2", "moe.num_experts=32", "moe.top_k=4"]
    sizes += ["moe.expert_hidden_size=512", f"train.global_batch_size={ranks}", "train.sequence_length=512"]
    return load_config(base, [*sizes, f"parallel.scheme={scheme}", *words])


def steps(skew: str, ranks: int = 8, count: int = 1, **more: Any):
    synthetic = Synthetic(Skew.parse(skew), 32, 4, ranks, 512, layers=2, steps=count, **more)
    return record_trace(synthetic)


def cost(config: Config, skew: str = "balanced", ranks: int = 8, settle: int = 1) -> StepCost:
    trace = steps(skew, ranks)
    task = Task(source_of(trace, config, mesh_of(config, ranks)), settle)
    return simulate({"way": config}, ranks, task, rates_of_teraflops(50, shape_of(config, 4)))[0]


def test_llep_and_laer_level_what_ep_leaves_to_one_rank():
    found = {s: cost(config_of(s, "parallel.least_loaded.min_rows=16"), "hot:75:4") for s in ("ep", "llep", "laer")}
    assert found["ep"].straggler > 3
    assert found["llep"].straggler < 1.05
    assert found["laer"].straggler < 1.6
    assert found["llep"].part("compute", "backward_compute") < 0.3 * found["ep"].part("compute", "backward_compute")
    assert found["llep"].part("weights", "backward_weights") > 0 == found["ep"].part("weights", "backward_weights")
    assert found["ep"].memory > found["llep"].memory


def test_weights_fetched_ahead_take_a_layers_slots_twice():
    without, ahead = (cost(config_of("laer", f"parallel.prefetch_layers={n}")) for n in (0, 1))
    slots, expert = 32 // 8 + 1, 3 * 512 * 512 * 4
    assert ahead.memory - without.memory == 2 * slots * expert
    assert ahead.seconds == without.seconds, "what it hides is not modelled"


def test_deduplication_saves_bytes_between_nodes_and_swaps_bring_partners_together():
    flat, dedup, swap = (
        cost(config_of(*words), "together:2")
        for words in (("ep",), ("hiermoe", "parallel.placement=fixed"), ("hiermoe",))
    )
    assert dedup.bytes_per_level["cluster"] < 0.75 * flat.bytes_per_level["cluster"]
    assert swap.swaps > 0 == dedup.swaps
    assert swap.bytes_per_level["cluster"] < dedup.bytes_per_level["cluster"]


def test_groups_that_are_alike_are_simulated_once_and_counted_each():
    config = config_of("ep", "parallel.expert_parallel_size=8", ranks=64)
    trace = steps("zipf:1")
    task = Task(source_of(trace, config, mesh_of(config, 64)), whole=False)
    rates = rates_of_teraflops(50, shape_of(config, 4))
    many = simulate({"way": config}, 64, task, rates)[0]
    few = config_of("ep", "parallel.expert_parallel_size=8")
    one = simulate({"way": few}, 8, Task(source_of(trace, few, mesh_of(few, 8)), whole=False), rates)[0]
    assert (many.groups, one.groups) == (1, 1)
    assert many.total == pytest.approx(one.total)
    assert many.bytes_per_level["cluster"] == 8 * one.bytes_per_level["cluster"]


def test_the_slowest_group_is_the_step():
    config = config_of("ep", "parallel.expert_parallel_size=4")
    even = skewed_counts(balanced(32), 32, 4, 2048)
    hot = np.zeros_like(even)
    hot[:, :4] = 512
    ids = np.tile(np.arange(4), (64, 1))
    both = Choices(np.concatenate([even, hot]), ids, np.arange(64) % 8)
    alone = Choices(np.concatenate([even, even]), ids, np.arange(64) % 8)
    rates = rates_of_teraflops(50, shape_of(config, 4))

    def seconds(choices: Choices) -> float:
        return simulate({"way": config}, 8, Task(lambda _: [[choices]], whole=False), rates)[0].total

    assert seconds(both) > 2 * seconds(alone)


def test_a_layout_lags_behind_what_it_was_made_for():
    shifting = steps("hot:75:4", count=4, drift=8)  # other experts are hot on every step
    steady = steps("hot:75:4", count=4)
    config = config_of("laer")
    rates = rates_of_teraflops(50, shape_of(config, 4))
    ratios = [
        simulate({"way": config}, 8, Task(source_of(t, config, mesh_of(config, 8)), settle=0, whole=False), rates)[0]
        for t in (steady, shifting)
    ]
    assert ratios[0].straggler < 0.7 * ratios[1].straggler


def test_chunks_hide_exchanges_and_a_row_budget_costs_time_but_bounds_rounds():
    long = "train.sequence_length=8192"
    plain, chunked = (cost(config_of("ep", f"parallel.overlap_chunks={n}", long)) for n in (1, 2))
    assert chunked.total < plain.total
    bounded = cost(config_of("ep", "parallel.max_rows_per_rank=2500"), "hot:75:4")
    assert bounded.part("recompute") > 0
    assert bounded.total > cost(config_of("ep"), "hot:75:4").total


def test_micro_batches_and_layers_that_are_alike_multiply():
    rates = rates_of_teraflops(50, shape_of(config_of("ep"), 4))
    trace = steps("zipf:1")

    def rows(*words: str, layers: int = 2) -> float:
        config = config_of("ep", f"model.num_layers={layers}", *words, ranks=16)
        task = Task(source_of(trace, config, mesh_of(config, 8)), alike=alike(trace, layers))
        return simulate({"way": config}, 8, task, rates)[0].part("compute", "backward_compute")

    assert rows("train.micro_batch_size=1") == pytest.approx(rows())
    assert rows(layers=6) == pytest.approx(3 * rows())


def test_choices_of_few_ranks_serve_many_of_other_sizes():
    record = Record(0, 0, 0, np.array([[3, 1, 0], [0, 2, 2]]), np.array([[0, 1], [1, 2]]), np.array([0, 1]))
    many = on_ranks(record, 5, 10)
    assert many.counts_RE.shape == (5, 3)
    assert (many.counts_RE.sum(1) == 20).all()
    np.testing.assert_array_equal(many.counts_RE[0], [15, 5, 0])
    np.testing.assert_array_equal(many.counts_RE[4], many.counts_RE[0])
    np.testing.assert_array_equal(scaled_to(np.array([1, 1, 1]), 4), [2, 1, 1])
    assert on_ranks(record, 2, 2).counts_RE is record.counts_RE


def test_lines_through_bench_layer_come_back():
    line, back = Line(1e-4, 2e-6, 3e-5), Line(2e-4, 4e-6, 6e-5)
    rows = [(t, k, e) for t in (64, 256) for k in (2, 4) for e in (4, 8)]
    reports = [
        {
            "tokens": t,
            "rows": [
                {
                    "ops": "fused",
                    "hidden_size": 64,
                    "expert_hidden_size": 32,
                    "top_k": k,
                    "num_experts": e,
                    "forward_milliseconds": 1e3 * line.seconds(t * k, e),
                    "milliseconds": 1e3 * (line.seconds(t * k, e) + back.seconds(t * k, e)),
                    "optimizer_milliseconds": 5.0,
                    "parameters": 1000,
                }
            ],
        }
        for t, k, e in rows
    ]
    words = ["model.hidden_size=64", "moe.expert_hidden_size=32", "model.num_attention_heads=1"]
    rates = rates_of_bench(reports, shape_of(load_config({}, words), 4))
    assert rates.per_parameter == pytest.approx(5e-6)
    for found, true in ((rates.forward, line), (rates.backward, back)):
        np.testing.assert_allclose(
            [found.fixed, found.per_row, found.per_expert], [true.fixed, true.per_row, true.per_expert], rtol=1e-6
        )
    wide = rates.of(shape_of(load_config({}, [*words[:1], "moe.expert_hidden_size=64", words[2]]), 4))
    assert wide.forward.per_row == pytest.approx(2 * line.per_row)
    assert isinstance(wide, Rates)
    with pytest.raises(ConfigError, match="bench layer"):
        rates_of_bench([], shape_of(load_config({}), 4))


def test_a_trace_of_another_layer_is_refused():
    config = config_of("ep", "moe.num_experts=16")
    with pytest.raises(ConfigError, match="the trace is of 32 experts"):
        source_of(steps("balanced"), config, mesh_of(config, 8))
