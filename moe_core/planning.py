"""From `parallel` to the planner of one layer: how counts become a Plan, and what a planner remembers between calls."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np

from .config import MoeConfig, ParallelConfig
from .placement import Placed
from .plan import Plan
from .planners.background import BackgroundSearch
from .planners.budget import LayerShape
from .planners.cost import CostModel
from .planners.layout import Layout, strided_layout, tiled_layout
from .planners.least_loaded import LeastLoadedOptions, plan_least_loaded, plan_least_loaded_sharded
from .planners.relayout import RelayoutOptions, RelayoutState, plan_relayout, slots_of, start
from .planners.static import owners, plan_static, slot_table
from .topology import Topology


class Planner(Protocol):
    """counts -> Plan, the same on every rank."""

    def plan(self, counts_RE: np.ndarray, training: bool) -> Plan:
        """The plan of this call. Only training calls are remembered."""
        ...

    def coming(self) -> np.ndarray | None:
        """(R, C) slots of the coming call, None where they depend on its counts. Changes nothing."""
        ...

    def state(self) -> dict[str, np.ndarray]:
        """What it remembers, for checkpoints."""
        ...

    def load(self, state: dict[str, np.ndarray]) -> None:
        """Remember what `state` returned."""
        ...

    def figures(self) -> dict[str, float]:
        """What the last call is worth telling, by name."""
        ...


@dataclass(frozen=True)
class Stateless:
    """A planner without memory. slots_RC: those of every plan, where they do not depend on counts."""

    function: Callable[[np.ndarray], Plan]
    slots_RC: np.ndarray | None = None

    def plan(self, counts_RE: np.ndarray, training: bool) -> Plan:
        return self.function(counts_RE)

    def coming(self) -> np.ndarray | None:
        return self.slots_RC

    def state(self) -> dict[str, np.ndarray]:
        return {}

    def load(self, state: dict[str, np.ndarray]) -> None:
        return

    def figures(self) -> dict[str, float]:
        return {}


class Relayout:
    """LAER's planner: the layout of this call was decided `lag` calls ago from the counts before it.

    Searches run in `executor`, beside the step; one that is late is waited for, and `figures` tells the seconds.
    """

    def __init__(
        self, options: RelayoutOptions, state: RelayoutState, owned_RC: np.ndarray | None, executor: Executor
    ) -> None:
        self._options, self._owned_RC, self._executor = options, owned_RC, executor
        self._search = BackgroundSearch(state, options, executor)
        self._last: Layout | None = None
        self._waited_ahead = 0.0
        self._figures = {"layout_wait_seconds": 0.0, "layouts_changed": 0.0}

    def plan(self, counts_RE: np.ndarray, training: bool) -> Plan:
        layout, waited = self._search.layout()
        changed = self._last is not None and bool((self._last.slots != layout.slots).any())
        waited, self._waited_ahead = waited + self._waited_ahead, 0.0
        self._last, self._figures = layout, {"layout_wait_seconds": waited, "layouts_changed": float(changed)}
        if training:
            self._search.observe(counts_RE)
        return plan_relayout(counts_RE, layout, self._options, self._owned_RC)

    def coming(self) -> np.ndarray | None:
        if self._owned_RC is not None:
            return None
        layout, waited = self._search.layout()
        self._waited_ahead += waited
        return slots_of(layout)

    def state(self) -> dict[str, np.ndarray]:
        """The window of counts and the layouts of the coming calls. Waits for searches."""
        return self._search.state().arrays()

    def load(self, state: dict[str, np.ndarray]) -> None:
        self._search = BackgroundSearch(RelayoutState.of_arrays(state), self._options, self._executor)

    def figures(self) -> dict[str, float]:
        return self._figures


def make_planner(
    moe: MoeConfig,
    parallel: ParallelConfig,
    ranks: int,
    node_of: tuple[int, ...] | None = None,
    executor: Executor | None = None,
    cost: CostModel | None = None,
) -> Planner:
    """The planner of a layer whose experts live on `ranks` ranks.

    executor: of searches (None: its own thread); cost: what they weigh layouts by (None: the published figures).
    """
    home_RC = slot_table(owners(moe.num_experts, ranks), ranks)
    sharded = parallel.residency == "fully_sharded"
    if parallel.planner == "relayout":
        options = relayout_options(parallel, slot_count(moe, parallel, ranks), node_of, cost)
        first = tiled_layout(moe.num_experts, ranks, options.slots_per_rank)
        memory = start(first, moe.num_experts, options)
        return Relayout(options, memory, None if sharded else home_RC, executor or ThreadPoolExecutor(1))
    if parallel.planner == "least_loaded":
        options = least_loaded_options(parallel, node_of)
        if not sharded:
            return Placed(lambda counts, owned: plan_least_loaded(counts, owned, options), home_RC)
        slots = slot_count(moe, parallel, ranks)
        return Stateless(lambda counts: plan_least_loaded_sharded(counts, home_RC, slots, options))
    if not sharded:
        return Placed(plan_static, home_RC)
    return _fixed_layout(moe.num_experts, ranks, slot_count(moe, parallel, ranks), node_of)


def slot_count(moe: MoeConfig, parallel: ParallelConfig, ranks: int) -> int:
    """C of sharded experts: as configured, but enough for every expert (the same file runs on fewer ranks).

    Without a word from the config, layouts that change have one slot more than they need.
    """
    fewest = -(-moe.num_experts // ranks)
    return max(fewest, parallel.slots_per_rank or fewest + (parallel.planner != "static"))


def _fixed_layout(num_experts: int, ranks: int, slots: int, node_of: tuple[int, ...] | None) -> Planner:
    """fsdp_ep, LAER's baseline: a fixed strided layout (replicas where there are more slots than experts)."""
    layout: Layout = strided_layout(num_experts, ranks, slots)
    options = RelayoutOptions(slots_per_rank=slots, node_of=node_of)
    return Stateless(lambda counts: plan_relayout(counts, layout, options), slots_of(layout))


def least_loaded_options(parallel: ParallelConfig, node_of: tuple[int, ...] | None = None) -> LeastLoadedOptions:
    """The numbers of `parallel.least_loaded`, exact."""
    c = parallel.least_loaded
    return LeastLoadedOptions(
        alpha=c.alpha,
        lambda_=c.imbalance_threshold,
        min_rows=c.min_rows,
        min_rows_far=c.min_rows_far,
        small_remainder=c.small_remainder,
        spill_order=c.spill_order,
        node_of=node_of,
        max_borrowed=c.max_borrowed,
        max_rows_per_rank=parallel.max_rows_per_rank,
    )


def layer_shape(moe: MoeConfig, width: int, element_bytes: int) -> LayerShape:
    """A layer of tokens of that width (of a sub-token, with heads), as budgets, costs and rates know it."""
    return LayerShape(
        num_experts=moe.num_experts,
        hidden_size=width,
        expert_hidden_size=moe.expert_hidden_size,
        top_k=moe.top_k,
        bytes_per_element=element_bytes,
        matrices=moe.gates + 1,
    )


def cost_model(topology: Topology, layer: LayerShape, teraflops: float | None, recompute: bool) -> CostModel | None:
    """LAER's cost from the cluster's lines and its devices' rate, exact fractions of them. None where either is
    missing: seconds of two machines do not add up."""
    far, near = topology.levels[0].within, topology.levels[min(1, topology.depth - 1)].within
    if teraflops is None or not far.beta or not near.beta:
        return None
    row_seconds = Fraction(layer.row_flops) / (Fraction(teraflops) * 10**12)
    betas = [Fraction(link.beta) * layer.row_bytes for link in (near, far)]
    return CostModel(row_near=betas[0], row_far=betas[1], row_compute=row_seconds, recompute=recompute)


def relayout_options(
    parallel: ParallelConfig, slots: int, node_of: tuple[int, ...] | None = None, cost: CostModel | None = None
) -> RelayoutOptions:
    """The numbers of `parallel.relayout`, exact."""
    c = parallel.relayout
    return RelayoutOptions(
        slots_per_rank=slots,
        node_of=node_of,
        window=c.window,
        lag=c.lag,
        hysteresis=c.hysteresis,
        skip_below=c.skip_below,
        rotate=c.rotate,
        cost=cost or CostModel(),
    )
