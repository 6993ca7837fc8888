"""HierMoE's expert swap in a training loop: count during a step, decide and move after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from ..backends.protocol import Array, Communicator, Group, Ops, State, Trainer
from .build import Runtime
from .config import Config, SwapConfig
from .layer import LayerStats
from .model import Model
from .placement import (
    Move,
    PlacedLayer,
    count_demand,
    demand_from,
    exchange_rows,
    exchanged,
    move_of,
    placed_layers,
    rank_of_expert,
)
from .planners.swap import (
    Demand,
    Objective,
    Swap,
    Threshold,
    best_swap,
    hierarchical_objective,
    load_objective,
    swap_units,
)
from .topology import Topology, flat_topology


@dataclass(frozen=True)
class SwapPolicy:
    """What a swap is judged by: units of each counted level, the objective, the threshold."""

    units: tuple[int, ...]
    objective: Objective
    threshold: Threshold
    every: int = 1


def swap_policy(
    config: SwapConfig, topology: Topology, depth: int, row_bytes: float, expert_bytes: float
) -> SwapPolicy:
    """The policy of `parallel.swap` for exchanges of `depth`; expert_bytes: one expert's weights and optimizer state.

    Where no link was measured, each level outwards counts as ten times slower.
    """
    if config.objective == "load":
        return SwapPolicy((), load_objective(config.smooth_exponent), Threshold(config.min_gain), config.every)
    measured = topology.with_nominal_links()
    objective = hierarchical_objective(measured, depth, row_bytes, config.seconds_per_row, config.smooth_exponent)
    slowest = measured.levels[0].within
    cost = slowest.seconds(expert_bytes) if measured is topology else 0.0
    threshold = Threshold(config.min_gain, float(config.horizon), cost)
    return SwapPolicy(swap_units(measured, depth), objective, threshold, config.every)


@dataclass
class Swapper:
    """The swaps of all layers of a model on one rank. Every rank decides the same from the same summed counts.

    expert: the group whose ranks share the experts; world: over which tokens are counted; copies: how many ranks
    hold the same tokens (tensor parallel).
    """

    ops: Ops
    comm: Communicator
    expert: Group
    world: Group
    policy: SwapPolicy
    layers: list[PlacedLayer]
    copies: int = 1
    bytes_sent: int = 0
    _counts: list[Array] = field(default_factory=list)

    def wants(self, step: int) -> bool:
        """Whether tokens of this step (from 0) are counted: those of the last step before a decision."""
        return bool(self.layers) and self.expert.size > 1 and (step + 1) % self.policy.every == 0

    def observe(self, stats: Sequence[LayerStats]) -> None:
        """Add one micro-batch: the stats of the placed layers, in order."""
        counts = [
            count_demand(self.ops, s.ids_TK, rank_of_expert(layer.planner.owned_RC), self.policy.units)
            for s, layer in zip(stats, self.layers, strict=True)
        ]
        self._counts = [a + b for a, b in zip(self._counts, counts, strict=True)] if self._counts else counts

    def after_step(self, trainer: Trainer, state: State) -> list[Swap | None]:
        """Decide one pair per layer from what was observed, move it, forget the counts. Collective.

        One all-reduce and one batch of messages for all layers. Call it after the optimizer's step.
        """
        if not self._counts:
            return []
        swaps = [best_swap(d, self.policy.objective, self.expert.size, self.policy.threshold) for d in self._demands()]
        moves: list[Move] = []
        for layer, swap in zip(self.layers, swaps, strict=True):
            if swap is None:
                continue
            mine = move_of(layer, swap.first, swap.second, self.expert.index)
            moves += [] if mine is None else [mine]
        if any(swaps):
            self.bytes_sent += exchange_rows(self.ops, trainer, state, self.comm, self.expert, moves)
        for layer, swap in zip(self.layers, swaps, strict=True):
            if swap is not None:
                layer.planner.owned_RC = exchanged(layer.planner.owned_RC, swap.first, swap.second)
        return swaps

    def _demands(self) -> list[Demand]:
        summed = self.ops.to_numpy(self.comm.all_reduce(self.ops.concat(self._counts), self.world)) / self.copies
        self._counts = []
        parts = np.split(summed, len(self.layers))
        owners = [rank_of_expert(layer.planner.owned_RC) for layer in self.layers]
        return [demand_from(part, rank_E, self.policy.units) for part, rank_E in zip(parts, owners, strict=True)]


def swapper_of(config: Config, runtime: Runtime, model: Model) -> Swapper | None:
    """The swapper that `config` asks for; None under `parallel.placement: fixed`."""
    if config.parallel.placement != "swap":
        return None
    topology = runtime.topology or flat_topology(runtime.groups["expert"].size)
    depth = 1
    if config.parallel.transport == "hierarchical_dedup":
        chosen = config.parallel.hierarchy_depth
        depth = topology.depth if chosen == "auto" else min(chosen, topology.depth)
    row_bytes = config.model.hidden_size * (2 if config.train.dtype == "bfloat16" else 4)
    layers = placed_layers(model.layers, model.parameters)
    expert_bytes = 3 * 4 * sum(prod(model.parameters[n].shape[1:]) for n in (layers[0].stacks if layers else ()))
    policy = swap_policy(config.parallel.swap, topology, depth, row_bytes, expert_bytes)
    groups, copies = runtime.groups, runtime.mesh.tensor
    return Swapper(runtime.ops, runtime.comm, groups["expert"], groups["world"], policy, layers, copies)
