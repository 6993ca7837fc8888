"""A training step on a cluster that is not there: every MoE layer's real plans and exchanges, priced by fitted lines.

Expert groups work apart until gradients are reduced: a step takes as long as the slowest group. Groups with the same
choices are simulated once, so a cluster costs as much as its distinct groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from .build import GROUPS
from .combinations import ConfigError, mesh_of
from .config import Config
from .mesh import Mesh
from .shapes import declared, moe_layers, shapes
from .simulate_exchange import Load
from .simulate_layer import LayerCost, LayerRun, Site, site_of
from .simulate_rates import Rates, shape_of
from .topology import Link, topology_of

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
HORIZON = 24
"""Most swaps of one layer before its steady state is priced."""


@dataclass(frozen=True, eq=False)
class Choices:
    """What all ranks of a job chose in one layer of one micro-batch. counts_RE: by token rank (of all groups);

    ids_SK, source_S: sampled tokens and the token rank that each is on.
    """

    counts_RE: np.ndarray
    ids_SK: np.ndarray
    source_S: np.ndarray


Source = Callable[[int], Sequence[Sequence[Choices]]]
"""Layer -> its choices by step and micro-batch."""


@dataclass
class StepCost:
    """seconds: of a step by part, in the slowest group; memory: bytes of the fullest rank; bytes_per_level: all ranks'.

    straggler: busiest rank's rows over the mean, mean over layers; local: share of rows that stay in their unit.
    """

    name: str
    config: Config
    mesh: Mesh
    seconds: dict[str, float] = field(default_factory=dict)
    memory: int = 0
    bytes_per_level: dict[str, int] = field(default_factory=dict)
    straggler: float = 1.0
    depth: int = 0
    swaps: int = 0
    groups: int = 0

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def part(self, *names: str) -> float:
        return sum(self.seconds.get(name, 0.0) for name in names)

    def as_dict(self) -> dict[str, object]:
        """For reports; seconds in milliseconds."""
        return {
            "scheme": self.name,
            "step_milliseconds": 1e3 * self.total,
            "parts_milliseconds": {k: 1e3 * v for k, v in self.seconds.items()},
            "memory_bytes": self.memory,
            "bytes_per_level": self.bytes_per_level,
            "straggler": self.straggler,
            "depth": self.depth,
            "swaps": self.swaps,
            "expert_parallel_size": self.mesh.expert,
            "tensor_parallel_size": self.mesh.tensor,
            "distinct_groups": self.groups,
        }


@dataclass
class _Tally:
    """Sums of one way of running over layers; by distinct group where groups differ."""

    site: Site
    mesh: Mesh
    seconds: dict[int, dict[str, float]] = field(default_factory=dict)
    extra_rows: dict[int, np.ndarray] = field(default_factory=dict)
    held: int = 0
    bytes_per_level: dict[str, int] = field(default_factory=dict)
    ratios: list[float] = field(default_factory=list)
    depth: int = 0
    swaps: int = 0

    def add(self, group: int, copies: int, costs: Sequence[LayerCost], times: tuple[int, float]) -> None:
        """The micro-batches of one layer in a group of which the job has `copies`. times: layers like this one, and
        micro-batches of a step for each of `costs`."""
        seconds, (layers, micros) = self.seconds.setdefault(group, {}), times
        for cost in costs:
            for part, value in cost.seconds.items():
                seconds[part] = seconds.get(part, 0.0) + layers * micros * value
            for level, sent in cost.bytes_per_level.items():
                self.bytes_per_level[level] = self.bytes_per_level.get(level, 0) + round(
                    copies * layers * micros * sent
                )
            self.ratios.append(cost.ratio)
            self.depth = max(self.depth, cost.depth)
        extra = layers * (costs[0].rows_R - costs[0].rows_R.mean())
        self.extra_rows[group] = self.extra_rows.get(group, 0.0) + extra
        self.held += layers * costs[0].held_bytes if group == 0 else 0


@dataclass(frozen=True)
class Task:
    """What is simulated. settle: how often a planner sees the first step before it counts (layouts that lag; experts
    that swap). whole: dense parts, reductions and the optimizer too; else the MoE layers alone, for one micro-batch.

    alike: (layer, how many layers of the model are like it); None: each layer of the model for itself.
    """

    source: Source
    settle: int = 1
    whole: bool = True
    alike: tuple[tuple[int, int], ...] | None = None


def simulate(ways: Mapping[str, Config], ranks: int, task: Task, rates: Rates) -> list[StepCost]:
    """The last step of the source under each way of running (a config by name), slowest group.

    ConfigError where ranks do not form a mesh.
    """
    tallies = {name: _tally(config, ranks, rates) for name, config in ways.items()}
    first = next(iter(ways.values()))
    for layer, times in task.alike or tuple((layer, 1) for layer in range(moe_layers(first))):
        steps = task.source(layer)
        sizes = {tally.mesh.expert for tally in tallies.values()}
        split = {size: [[_groups(choices, size) for choices in step] for step in steps] for size in sizes}
        distinct = {size: _distinct(split[size]) for size in sizes}
        for name, config in ways.items():
            size = tallies[name].mesh.expert
            _run_layer(config, tallies[name], _Layer(split[size], distinct[size], times), task)
    return [_finish(name, config, tallies[name], ranks, task.whole) for name, config in ways.items()]


def tokens_per_micro_batch(config: Config, mesh: Mesh) -> int:
    """Tokens of one rank in one micro-batch."""
    share = max(1, config.train.global_batch_size // mesh.token_ranks)
    return (config.train.micro_batch_size or share) * config.train.sequence_length


def micro_batches(config: Config, mesh: Mesh) -> int:
    """Micro-batches of a step."""
    share = max(1, config.train.global_batch_size // mesh.token_ranks)
    return share // (config.train.micro_batch_size or share)


def _tally(config: Config, ranks: int, rates: Rates) -> _Tally:
    if config.moe.num_heads > 1:
        raise ConfigError("layers of several heads are not simulated; docs/heads.md has their traffic")
    mesh = mesh_of(config, ranks)
    shape = shape_of(config, BYTES[config.train.dtype])
    return _Tally(site_of(config, mesh, rates, shape), mesh)


@dataclass(frozen=True)
class _Layer:
    """loads: by step, micro-batch and group; distinct: (group, groups like it); times: layers like this one."""

    loads: list[list[list[Load]]]
    distinct: list[tuple[int, int]]
    times: int


def _run_layer(config: Config, tally: _Tally, layer: _Layer, task: Task) -> None:
    """One layer in all distinct groups."""
    split, settle = layer.loads, task.settle
    micros = micro_batches(config, tally.mesh) / len(split[-1]) if task.whole else 1.0
    for group, copies in layer.distinct:
        run = LayerRun(config, tally.site)
        first = [loads[group] for loads in split[0]]
        for _ in range(settle if config.parallel.planner == "relayout" else 0):
            run.plan(first[0])
        for _ in range(HORIZON if settle and config.parallel.placement == "swap" else 0):
            if not run.swap(first[0]):
                break
        costs: list[LayerCost] = []
        for step in split:
            loads = [groups[group] for groups in step]
            plans = [run.plan(load) for load in loads]
            if step is split[-1]:
                costs = [run.cost(load, plan) for load, plan in zip(loads, plans, strict=True)]
            else:
                run.swap(loads[-1])
        tally.swaps += run.swaps
        tally.add(group, copies, costs, (layer.times, micros))


def _groups(choices: Choices, size: int) -> list[Load]:
    """The loads of a job's expert groups: runs of `size` token ranks.

    A group whose sampled tokens are not all of its tokens takes those of the other groups too.
    """
    found = []
    top_k = choices.ids_SK.shape[1]
    everyone = choices.ids_SK, choices.source_S % size
    for g in range(len(choices.counts_RE) // size):
        counts = choices.counts_RE[g * size : (g + 1) * size].astype(np.int64)
        mine = np.flatnonzero(choices.source_S // size == g)
        whole = len(mine) * top_k >= counts.sum()
        sample = (choices.ids_SK[mine], choices.source_S[mine] - g * size) if whole else everyone
        found.append(Load(counts, *sample))
    return found


def _distinct(split: Sequence[Sequence[Sequence[Load]]]) -> list[tuple[int, int]]:
    """(group, how many groups are like it) in order of appearance."""
    seen: dict[tuple[bytes, ...], list[int]] = {}
    for group in range(len(split[0][0])):
        key = tuple(loads[group].counts_RE.tobytes() for step in split for loads in step)
        seen.setdefault(key, []).append(group)
    return [(groups[0], len(groups)) for groups in seen.values()]


# --- the rest of a step ------------------------------------------------------------------------
def _finish(name: str, config: Config, tally: _Tally, ranks: int, whole: bool) -> StepCost:
    slowest = max(tally.seconds, key=lambda g: sum(tally.seconds[g].values()))
    cost = StepCost(
        name=name,
        config=config,
        mesh=tally.mesh,
        seconds=dict(tally.seconds[slowest]),
        bytes_per_level=tally.bytes_per_level,
        straggler=float(np.mean(tally.ratios)),
        depth=tally.depth,
        swaps=tally.swaps,
        groups=len(tally.seconds),
    )
    if whole:
        cost.seconds |= _rest(config, tally)
        cost.memory = _memory(config, tally, ranks)
    return cost


def _rest(config: Config, tally: _Tally) -> dict[str, float]:
    """Dense compute (attention that is cut over tensor ranks is summed once each way), reductions, the optimizer."""
    mesh, rates = tally.mesh, tally.site.rates
    tokens = config.train.global_batch_size // mesh.token_ranks * config.train.sequence_length
    dense = stored = 0
    reduced: dict[str, int] = {}
    for parameter in declared(config, mesh):
        size = prod(parameter.shape)
        stored += size
        dense += 0 if parameter.pieces else size
        reduced[parameter.reduce_over] = reduced.get(parameter.reduce_over, 0) + size
    scores = config.model.num_layers * config.model.hidden_size * config.train.sequence_length / mesh.tensor
    again = 4 / 3 if config.train.recompute == "layer" else 1.0
    flops = again * 6.0 * tokens * (dense + scores)
    inside = 4 * config.model.num_layers * micro_batches(config, mesh)
    activations = tokens_per_micro_batch(config, mesh) * config.model.hidden_size * BYTES[config.train.dtype]
    return {
        "dense": flops / rates.flops_per_second,
        "dense_sums": inside * tally.site.tensor.seconds(activations) if mesh.tensor > 1 else 0.0,
        "reduce": sum(_reduce_seconds(config, mesh, group, size) for group, size in reduced.items()),
        "optimizer": stored * rates.per_parameter,
    }


def _reduce_seconds(config: Config, mesh: Mesh, group: str, size: int) -> float:
    """An all-reduce moves what two all-to-alls of the same bytes do; sharded dense parameters are gathered twice."""
    axes = GROUPS[group]
    if prod(getattr(mesh, axis) for axis in axes) == 1:
        return 0.0
    link: Link = topology_of(config.cluster, mesh.partition(*axes)).levels[0].within
    sharded = config.parallel.data_sharding == "full" and group != "expert_data"
    return (3 if sharded else 2) * link.seconds(size * max(4, BYTES[config.train.dtype]))


def _memory(config: Config, tally: _Tally, ranks: int) -> int:
    """What `--dry-run` says, plus the activations of the rows that the busiest rank has beyond the mean, plus weights
    that are gathered or borrowed (kept for backward unless the layer is recomputed); those of a layer that are fetched
    ahead, as they leave and as they arrive."""
    moe, element = config.moe, BYTES[config.train.dtype]
    row = (2 * config.model.hidden_size + (moe.gates + 1) * moe.expert_hidden_size) * element
    extra = max(float(rows.max()) for rows in tally.extra_rows.values())
    layers = moe_layers(config) if config.train.recompute == "none" else 1
    held = tally.held // (1 if config.train.recompute == "none" else moe_layers(config))
    rows = extra / moe_layers(config) * layers * row
    ahead = 2 * config.parallel.prefetch_layers * tally.held // max(1, moe_layers(config))
    return int(shapes(config, ranks).memory_per_rank.total + rows + held + ahead)
