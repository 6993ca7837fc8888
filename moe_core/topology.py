"""Where ranks sit: nested units (node, socket, island, card), and what an all-to-all costs at each level.

Notation of HierMoE (arXiv 2508.09591): level 0 is everything, U[i] units at level i, U[0] = 1. A unit of level i
holds ranks/U[i] consecutive members of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..backends.protocol import Launch
from .config import ClusterConfig, LevelConfig


@dataclass(frozen=True)
class Link:
    """Seconds of an all-to-all of n bytes per rank: alpha + n * beta."""

    alpha: float = 0.0
    beta: float = 0.0

    def seconds(self, bytes_per_rank: float) -> float:
        return self.alpha + bytes_per_rank * self.beta


@dataclass(frozen=True)
class Level:
    """One level of a group's hierarchy.

    within: all-to-all among all ranks of one unit. rails: among one rank of each unit of this level inside one
    unit of the level above (unused at level 0). shared: ranks of a unit one level in share its link to the others.
    collectives: what others than all-to-all take within, where it was measured.
    """

    name: str
    units: int
    within: Link = Link()
    rails: Link = Link()
    shared: bool = False
    collectives: tuple[tuple[str, Link], ...] = ()

    def collective(self, name: str) -> Link | None:
        """The line of an all_gather or all_reduce of n bytes per rank; None where nobody measured it."""
        return dict(self.collectives).get(name)


@dataclass(frozen=True)
class Topology:
    """Levels of a group of `ranks`, outermost first; levels[0] is the whole group."""

    ranks: int
    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        units = self.units
        if not units or units[0] != 1:
            raise ValueError(f"the outermost level has {units[:1]} units; it must be one unit with all ranks")
        for outer, inner in zip(units, (*units[1:], self.ranks), strict=True):
            if inner % outer or inner < outer:
                raise ValueError(
                    f"{units} units over {self.ranks} ranks are not nested; each number must divide the next"
                )

    @property
    def units(self) -> tuple[int, ...]:
        """U, outermost first."""
        return tuple(level.units for level in self.levels)

    @property
    def depth(self) -> int:
        """D: the largest number of stages of a hierarchical exchange."""
        return len(self.levels)

    def unit_of(self, level: int) -> np.ndarray:
        """(R,) unit of each rank at a level."""
        return np.arange(self.ranks) // (self.ranks // self.levels[level].units)

    def with_nominal_links(self) -> Topology:
        """Itself if any link was measured; else each level outwards is ten times slower than the one inside."""
        if any(link.beta for level in self.levels for link in (level.within, level.rails)):
            return self
        links = [Link(0.0, 1e-9 * 0.1**i) for i in range(self.depth + 1)]
        levels = [replace(x, within=links[i], rails=links[max(0, i - 1)]) for i, x in enumerate(self.levels)]
        return replace(self, levels=tuple(levels))

    def fan(self, stage: int, depth: int) -> tuple[int, int]:
        """(units before, units after) stage 1..depth; the last stage goes to single ranks."""
        after = self.ranks if stage == depth else self.units[stage]
        return self.units[stage - 1], after

    def link(self, stage: int, depth: int) -> Link:
        """What stage 1..depth of an exchange of that depth costs (HierMoE eq. 3)."""
        return self.levels[stage - 1].within if stage == depth else self.levels[stage].rails

    def stage_name(self, stage: int, depth: int) -> str:
        """'node rails' between nodes, 'node' inside one node, 'flat' for the only stage of depth 1."""
        if depth == 1:
            return "flat"
        return self.levels[stage - 1].name if stage == depth else f"{self.levels[stage].name} rails"

    def bytes_by_level(self, sent_RR: np.ndarray) -> dict[str, int]:
        """Bytes between different ranks by the name of the smallest unit that holds both."""
        inside = [int(np.einsum("iaib->", _blocks(sent_RR, units))) for units in (*self.units, self.ranks)]
        return {self.levels[i].name: inside[i] - inside[i + 1] for i in range(self.depth - 1, -1, -1)}


def _blocks(x_RR: np.ndarray, units: int) -> np.ndarray:
    size = len(x_RR) // units
    return x_RR.reshape(units, size, units, size)


def flat_topology(ranks: int) -> Topology:
    """One level, nothing known of links."""
    return Topology(ranks, (Level("host", 1),))


def topology_of(cluster: ClusterConfig, groups: Sequence[Sequence[int]]) -> Topology:
    """The hierarchy that is common to all `groups` of ranks (equal sizes).

    A level of the cluster counts where it cuts every group into equal runs of consecutive members; others are
    left out (the exchange then falls back to the levels that fit).
    """
    ranks = len(groups[0])
    outer = cluster.levels[-1]
    kept = [_level(outer, 1)]
    for level in reversed(cluster.levels[:-1]):
        units = _equal_units(level, groups)
        if units is None or units % kept[-1].units or units == ranks:
            continue
        if units == kept[-1].units:  # the same runs, described by a smaller unit
            kept[-1] = replace(_level(level, units), rails=kept[-1].rails)
        else:
            kept.append(replace(_level(level, units), rails=_rails(outer)))
        outer = level
    return Topology(ranks, tuple(kept))


def _level(level: LevelConfig, units: int) -> Level:
    others = tuple((c.name, Link(c.alpha or 0.0, c.beta)) for c in level.collectives if c.beta is not None)
    return Level(level.name, units, _within(level), shared=level.shared_link, collectives=others)


def _within(level: LevelConfig) -> Link:
    return Link(level.alpha, level.beta)


def _rails(level: LevelConfig) -> Link:
    alpha = level.alpha if level.rail_alpha is None else level.rail_alpha
    return Link(alpha, level.beta if level.rail_beta is None else level.rail_beta)


def _equal_units(level: LevelConfig, groups: Sequence[Sequence[int]]) -> int | None:
    """Into how many equal runs the level cuts each group; None where it does not."""
    found: set[int] = set()
    for group in groups:
        unit = np.asarray(group) // (level.size or max(max(g) for g in groups) + 1)
        starts = np.flatnonzero(np.append(True, unit[1:] != unit[:-1]))
        lengths = np.diff(np.append(starts, len(unit)))
        if len(set(unit[starts].tolist())) != len(starts) or len(set(lengths.tolist())) != 1:
            return None
        found.add(len(starts))
    return found.pop() if len(found) == 1 else None


def node_of_ranks(cluster: ClusterConfig, ranks: Sequence[int]) -> np.ndarray:
    """Node (unit of the outermost level but one) of each rank; zeros where the cluster has one level."""
    size = cluster.levels[-2].size if len(cluster.levels) > 1 else None
    return np.zeros(len(ranks), np.int64) if size is None else np.asarray(ranks) // size


def cluster_of_launch(launch: Launch, cluster: ClusterConfig) -> ClusterConfig:
    """`cluster`, or nodes of `local_size` ranks where the file leaves the default and a launcher tells of nodes."""
    if cluster != ClusterConfig() or launch.local_size == launch.size:
        return cluster
    levels = (LevelConfig(name="node", size=launch.local_size), LevelConfig(name="cluster"))
    return ClusterConfig(name="launched", levels=levels)
