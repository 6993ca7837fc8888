"""Volumes and times of a deduplicated exchange from integer counts: what chooses its depth (HierMoE eq. 1 to 7).

`hits[i]` (R, U) counts, per source rank, the tokens with at least one kept expert in each unit; index 0 to D-1 are
the topology's levels, index D single ranks. They are the same on every rank, so what follows from them is too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from ..topology import Topology


@dataclass(frozen=True)
class Stage:
    """One all-to-all of an exchange: from the ranks of a unit to one rank of each of its `fan` parts.

    rows[r, s]: rows from rank r to rank s of the whole group, equal to r's own where they stay. A rank holds
    rows of sources with its own offset in the unit: so r sends to offset r mod (ranks per part).
    """

    number: int
    depth: int
    fan: int
    part: int
    rows: np.ndarray

    def peers(self, rank: int) -> np.ndarray:
        """(fan,) ranks that `rank` talks to, in the order of the parts."""
        size = self.fan * self.part
        return rank // size * size + np.arange(self.fan) * self.part + rank % self.part


def level_units(topology: Topology) -> tuple[int, ...]:
    """Units of each entry of `hits`: the topology's levels, then single ranks."""
    return (*topology.units, topology.ranks)


def stages(topology: Topology, depth: int, hits: Sequence[np.ndarray]) -> list[Stage]:
    """The all-to-alls of an exchange of `depth`, outermost first."""
    return [_stage(topology, number, depth, hits) for number in range(1, depth + 1)]


def _stage(topology: Topology, number: int, depth: int, hits: Sequence[np.ndarray]) -> Stage:
    """After a stage, rows of source s for part g rest on the rank of g with offset s mod (ranks per part)."""
    ranks = topology.ranks
    before, after = topology.fan(number, depth)
    size, part = ranks // before, ranks // after
    counts = hits[-1] if number == depth else hits[number]
    by_offset = counts.reshape(-1, size, after).sum(0)  # (offset in the unit, part of the whole group)
    rows = np.zeros((ranks, ranks), np.int64)
    holder = np.arange(ranks)
    for j in range(after // before):
        g = holder // size * (after // before) + j
        rows[holder, g * part + holder % part] = by_offset[holder % size, g]
    return Stage(number, depth, after // before, part, rows)


def message_rows(stage: Stage) -> int:
    """Rows per rank that bound the stage: fan x the largest block between two ranks (HierMoE eq. 2, 4, 5)."""
    return stage.fan * int(stage.rows.max(initial=0))


def balanced_rows(topology: Topology, depth: int, hits: Sequence[np.ndarray]) -> list[float]:
    """Rows per rank of each stage if all rails carry the same: from counts summed over sources only."""
    found = []
    for number in range(1, depth + 1):
        after = topology.fan(number, depth)[1]
        counts = (hits[-1] if number == depth else hits[number]).sum(0)
        found.append(after / topology.ranks * float(counts.max(initial=0)))
    return found


def seconds(topology: Topology, depth: int, rows: Sequence[float], row_bytes: float) -> float:
    """Modelled time of one exchange (HierMoE eq. 1 and 3)."""
    return sum(
        topology.link(number, depth).seconds(n * row_bytes) for number, n in zip(range(1, depth + 1), rows, strict=True)
    )


def choose_depth(
    topology: Topology, hits: Sequence[np.ndarray], row_bytes: float, usual: int = 1, margin: float = 0.02
) -> int:
    """Depth of the least modelled time (HierMoE eq. 6); `usual` stays unless another is faster by `margin`.

    Ties go to the smaller depth. The same integers give the same answer on every rank.
    """
    times = [
        seconds(topology, d, [message_rows(s) for s in stages(topology, d, hits)], row_bytes)
        for d in range(1, topology.depth + 1)
    ]
    best = int(np.argmin(times)) + 1
    return best if times[best - 1] < times[usual - 1] * (1 - margin) else usual


def expected_groups(num_experts: int, groups: int, top_k: int) -> float:
    """Distinct groups that a token hits when its experts are drawn evenly without repetition."""
    per_group = num_experts // groups
    return groups * (1 - comb(num_experts - per_group, top_k) / comb(num_experts, top_k))


def usual_depth(topology: Topology, num_experts: int, top_k: int, tokens: int, row_bytes: float) -> int:
    """Depth of the least modelled time under even routing, `tokens` per rank."""
    times = []
    for depth in range(1, topology.depth + 1):
        rows = [tokens * expected_groups(num_experts, topology.fan(n, depth)[1], top_k) for n in range(1, depth + 1)]
        times.append(seconds(topology, depth, rows, row_bytes))
    return int(np.argmin(times)) + 1
