"""Planners of a layer as the config makes them: layouts beside the step, and what survives a checkpoint."""

from __future__ import annotations

import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import numpy as np
import pytest
from twinmoe.moe_core.config import MoeConfig, ParallelConfig
from twinmoe.moe_core.planners import relayout
from twinmoe.moe_core.planners.budget import LayerShape
from twinmoe.moe_core.planners.cost import CostModel
from twinmoe.moe_core.planners.layout import tiled_layout
from twinmoe.moe_core.planners.relayout import RelayoutOptions, plan_relayout
from twinmoe.moe_core.planning import Planner, cost_model, make_planner, relayout_options
from twinmoe.moe_core.topology import Level, Link, Topology, flat_topology

MOE = MoeConfig(num_experts=6, top_k=2)
LAER = ParallelConfig.model_validate(
    {
        "planner": "relayout",
        "residency": "fully_sharded",
        "slots_per_rank": 2,
        "relayout": {"skip_below": 0, "hysteresis": 0, "window": 3, "lag": 2},
    }
)


def drifting(calls: int) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    base = 1.0 / np.arange(1, 7)
    return [rng.multinomial(2000, np.roll(base, c // 3) / base.sum(), 4).astype(np.int64) for c in range(calls)]


def laer(executor: Executor | None = None) -> Planner:
    return make_planner(MOE, LAER, 4, None, executor)


def test_layouts_searched_beside_the_step_are_those_of_the_plain_loop() -> None:
    options: RelayoutOptions = relayout_options(LAER, 2)
    state, planner, changed = relayout.start(tiled_layout(6, 4, 2), 6, options), laer(), 0.0
    for counts in drifting(12):
        expected = plan_relayout(counts, relayout.next_layout(state), options)
        plan = planner.plan(counts, True)
        np.testing.assert_array_equal(plan.slots, expected.slots)
        np.testing.assert_array_equal(plan.flow, expected.flow)
        changed += planner.figures()["layouts_changed"]
        state = relayout.advance(state, counts, options)
    assert changed >= 2
    for name, array in planner.state().items():
        np.testing.assert_array_equal(array, state.arrays()[name])


def test_window_and_pending_layouts_survive_a_checkpoint() -> None:
    seen = drifting(12)
    unbroken, first = laer(), laer()
    for counts in seen[:5]:
        unbroken.plan(counts, True)
        first.plan(counts, True)
    saved = {name: array.copy() for name, array in first.state().items()}
    assert saved["window"].shape == (3, 4, 6)
    assert saved["layouts"].shape == (2, 4, 2)
    resumed = laer()
    resumed.load(saved)
    for counts in seen[5:]:
        a, b = unbroken.plan(counts, True), resumed.plan(counts, True)
        np.testing.assert_array_equal(a.slots, b.slots)
        np.testing.assert_array_equal(a.flow, b.flow)


def test_evaluation_is_planned_and_not_remembered() -> None:
    planner = laer()
    before = {name: array.copy() for name, array in planner.state().items()}
    for counts in drifting(4):
        planner.plan(counts, False)
    for name, array in planner.state().items():
        np.testing.assert_array_equal(array, before[name])


class Slow(ThreadPoolExecutor):
    """A search takes at least 30 ms."""

    def submit(self, fn, /, *args, **kwargs) -> Future:  # type: ignore[override]
        def late() -> object:
            time.sleep(0.03)
            return fn(*args, **kwargs)

        return super().submit(late)


def test_a_late_search_is_waited_for_and_the_seconds_are_told() -> None:
    planner, quick = laer(Slow(1)), laer()
    waited = []
    for counts in drifting(4):
        np.testing.assert_array_equal(planner.plan(counts, True).slots, quick.plan(counts, True).slots)
        waited.append(planner.figures()["layout_wait_seconds"])
    assert waited[0] == waited[1] == 0.0  # the first two calls use the first layout
    assert waited[2] > 0.005
    assert waited[3] > 0.005


@pytest.mark.parametrize(
    "parallel",
    [{}, {"planner": "least_loaded", "residency": "borrowed"}, {"residency": "fully_sharded"}],
)
def test_planners_without_memory_have_nothing_to_save_or_tell(parallel: dict[str, str]) -> None:
    planner = make_planner(MOE, ParallelConfig.model_validate(parallel), 4)
    planner.plan(drifting(1)[0], True)
    assert planner.state() == {}
    assert planner.figures() == {}


def test_the_cost_of_a_layout_comes_from_the_cluster_s_lines_and_its_devices_rate() -> None:
    shape = LayerShape(8, 4096, 14336, 2)
    levels = (Level("cluster", 1, Link(1e-4, 2e-8)), Level("node", 2, Link(1e-5, 5e-9)))
    cost = cost_model(Topology(4, levels), shape, 215.0, recompute=True)
    assert cost is not None
    assert float(cost.row_far) == pytest.approx(8192 * 2e-8)
    assert float(cost.row_near) == pytest.approx(8192 * 5e-9)
    assert float(cost.row_compute) == pytest.approx(1.638e-6, rel=1e-3)  # as profiled for a Mixtral expert
    assert relayout_options(LAER, 2, None, cost).cost is cost
    assert cost_model(Topology(4, levels), shape, None, True) is None
    assert cost_model(flat_topology(4), shape, 215.0, True) is None
    assert relayout_options(LAER, 2).cost == CostModel()
