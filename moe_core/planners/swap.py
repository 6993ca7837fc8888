"""HierMoE's expert swap (arXiv 2508.09591, eq. 8 to 11): which two experts should exchange places.

T tokens, E experts, U units of a level (nodes, ..., single ranks). Everything follows from sums of integers over
tokens, so ranks that add up the same counts decide the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..topology import Topology

PASSES = 4
"""Exchanges of a training step: dispatch, combine, and the gradient of each."""


@dataclass(frozen=True, eq=False)
class LevelCounts:
    """What one level must know. unit_E: where each expert is; hit_U: tokens that chose an expert there.

    miss_EU: tokens that chose the expert and none of the unit; sole_EE[a, b]: tokens for which a is the only choice
    in its unit and that did not choose b.
    """

    unit_E: np.ndarray
    hit_U: np.ndarray
    miss_EU: np.ndarray
    sole_EE: np.ndarray


@dataclass(frozen=True)
class Objective:
    """Seconds of a step as a sum of maxima.

    seconds_per_token: for each level, per token of its busiest unit; seconds_per_row: of compute, per row of the
    busiest rank (0: the published objective, which does not see compute). fixed: latencies. smooth: exponent of
    the smooth maximum, None for the plain one.
    """

    seconds_per_token: tuple[float, ...] = ()
    seconds_per_row: float = 0.0
    fixed: float = 0.0
    smooth: int | None = 10


@dataclass(frozen=True)
class Threshold:
    """When a swap is worth it: a relative gain, and horizon steps of gain over the seconds of moving two experts."""

    relative: float = 1e-3
    horizon: float = 1.0
    transfer_seconds: float = 0.0


@dataclass(frozen=True)
class Swap:
    """Experts first < second exchange places; modelled seconds before and after."""

    first: int
    second: int
    before: float
    after: float


@dataclass(frozen=True, eq=False)
class Demand:
    """Counts of one layer, summed over all tokens that its experts serve: rows per expert, and each level's."""

    load_E: np.ndarray
    rank_E: np.ndarray
    levels: tuple[LevelCounts, ...] = field(default=())


def count_level(chosen_TE: np.ndarray, unit_E: np.ndarray, units: int) -> LevelCounts:
    """Counts of one level from 0/1 choices. Three matrix products: O(T E (E + U))."""
    chosen = chosen_TE.astype(np.float64)
    inside_EU = (unit_E[:, None] == np.arange(units)).astype(np.float64)
    hits_TU = chosen @ inside_EU
    sole = chosen * (hits_TU[:, unit_E] == 1)
    return LevelCounts(
        unit_E=unit_E,
        hit_U=(hits_TU > 0).sum(0),
        miss_EU=(chosen.T @ (hits_TU == 0)).astype(np.int64),
        sole_EE=(sole.T @ (1 - chosen)).astype(np.int64),
    )


def counts_after_swap(counts: LevelCounts) -> np.ndarray:
    """(E, E, U): hit_U if experts a and b exchanged places, for every pair.

    b's unit gains the tokens that chose a and nothing there, and loses those whose only choice there was b
    unless they chose a; likewise a's unit. Pairs of one unit change nothing.
    """
    unit, num = counts.unit_E, len(counts.unit_E)
    after = np.broadcast_to(counts.hit_U, (num, num, len(counts.hit_U))).copy()
    a, b = np.nonzero(unit[:, None] != unit[None, :])
    after[a, b, unit[b]] += counts.miss_EU[a, unit[b]] - counts.sole_EE[b, a]
    after[a, b, unit[a]] += counts.miss_EU[b, unit[a]] - counts.sole_EE[a, b]
    return after


def loads_after_swap(load_E: np.ndarray, rank_E: np.ndarray, ranks: int) -> np.ndarray:
    """(E, E, R): rows per rank if experts a and b exchanged places."""
    loads = np.bincount(rank_E, load_E, ranks).astype(np.int64)
    after = np.broadcast_to(loads, (len(load_E), len(load_E), ranks)).copy()
    a, b = np.nonzero(rank_E[:, None] != rank_E[None, :])
    after[a, b, rank_E[a]] += load_E[b] - load_E[a]
    after[a, b, rank_E[b]] += load_E[a] - load_E[b]
    return after


def smooth_max(x: np.ndarray, exponent: int | None) -> np.ndarray:
    """max(x) (sum (x / max)^g)^(1/g) along the last axis (eq. 11): at least the maximum; 0 where all are 0."""
    top = x.max(-1, initial=0)
    if exponent is None:
        return top.astype(np.float64)
    share = x / np.where(top > 0, top, 1)[..., None]
    return top * (share**exponent).sum(-1) ** (1.0 / exponent)


def modelled_seconds(demand: Demand, objective: Objective, ranks: int) -> np.ndarray:
    """(E, E): seconds of a step after each swap; the diagonal is the present (eq. 8 to 10, plus compute)."""
    num = len(demand.load_E)
    total = np.full((num, num), objective.fixed)
    for level, weight in zip(demand.levels, objective.seconds_per_token, strict=True):
        total += weight * smooth_max(counts_after_swap(level), objective.smooth)
    if objective.seconds_per_row:
        loads = loads_after_swap(demand.load_E, demand.rank_E, ranks)
        total += objective.seconds_per_row * smooth_max(loads, objective.smooth)
    return total


def best_swap(demand: Demand, objective: Objective, ranks: int, threshold: Threshold | None = None) -> Swap | None:
    """The pair with the least modelled time, if it is worth the move. Ties: lowest (first, second).

    Times are compared in billionths of the present one, so that the last bits of a power do not decide.
    """
    threshold = threshold or Threshold()
    seconds = modelled_seconds(demand, objective, ranks)
    before = float(seconds[0, 0])
    if before <= 0:
        return None
    first, second = np.triu_indices(len(demand.load_E), 1)
    relative = np.round(seconds[first, second] / before, 9)
    if not relative.size:
        return None
    best = int(relative.argmin())
    after = float(seconds[first[best], second[best]])
    gain = before - after
    if relative[best] >= 1 - threshold.relative or gain * threshold.horizon <= threshold.transfer_seconds:
        return None
    return Swap(int(first[best]), int(second[best]), before, after)


def hierarchical_objective(
    topology: Topology, depth: int, row_bytes: float, seconds_per_row: float = 0.0, smooth: int | None = 10
) -> Objective:
    """The time of a step's exchanges of that depth, rails balanced (eq. 3 to 5 with global counts).

    Expects one level of counts per stage: units of stages 1..depth-1, then single ranks (`swap_units`).
    """
    links = [topology.link(n, depth) for n in range(1, depth + 1)]
    shares = [units / topology.ranks for units in swap_units(topology, depth)]
    return Objective(
        seconds_per_token=tuple(PASSES * s * row_bytes * link.beta for s, link in zip(shares, links, strict=True)),
        seconds_per_row=seconds_per_row,
        fixed=PASSES * sum(link.alpha for link in links),
        smooth=smooth,
    )


def swap_units(topology: Topology, depth: int) -> tuple[int, ...]:
    """Number of units of each level that a hierarchical objective of that depth counts."""
    return tuple(topology.fan(n, depth)[1] for n in range(1, depth + 1))


def load_objective(smooth: int | None = None) -> Objective:
    """Rows of the busiest rank alone, as SmartMoE balances: it does not see what deduplication saves."""
    return Objective(seconds_per_row=1.0, smooth=smooth)


def demand_of(chosen_TE: np.ndarray, rank_E: np.ndarray, ranks: int, units: Sequence[int]) -> Demand:
    """Counts of one layer from 0/1 choices of all tokens."""
    levels = tuple(count_level(chosen_TE, rank_E // (ranks // u), u) for u in units)
    return Demand(chosen_TE.sum(0).astype(np.int64), rank_E, levels)
