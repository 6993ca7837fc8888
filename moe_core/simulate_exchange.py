"""What a plan's exchange moves and how long that takes, without ranks: exact counts, and ids of sampled tokens.

Counts alone say what flat and group-wise exchanges move. What deduplication saves depends on whole id sets: it is
counted on the sampled tokens and scaled to the exact number of copies (exact where every token is in the sample).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .plan import Plan
from .topology import Topology
from .transport.base import Traffic
from .transport.depth import choose_depth, level_units, stages, usual_depth
from .transport.groupwise import Slices
from .transport.hierarchical import stage_traffic


@dataclass(frozen=True, eq=False)
class Load:
    """What the tokens of one expert group chose in one layer. counts_RE: rows per source rank and expert.

    ids_SK, source_S: experts (-1: none) of sampled tokens, and the rank of the group that each is on.
    """

    counts_RE: np.ndarray
    ids_SK: np.ndarray
    source_S: np.ndarray

    @property
    def top_k(self) -> int:
        return self.ids_SK.shape[1]

    def complete(self) -> bool:
        """Whether the sample is every token."""
        ranks, experts = self.counts_RE.shape
        kept = self.ids_SK >= 0
        keys = (self.source_S[:, None] * experts + self.ids_SK)[kept]
        return bool((np.bincount(keys, minlength=ranks * experts) == self.counts_RE.reshape(-1)).all())


@dataclass(frozen=True)
class RowSize:
    """Bytes of a row, of one of its weights in transit, and of an element."""

    width: int
    element: int
    weight: int = 4

    @property
    def row(self) -> int:
        return self.width * self.element


@dataclass(frozen=True)
class Route:
    """`parallel`'s words about transport. depth: None chooses; parts: ranks of a tensor group."""

    transport: str
    depth: int | None = None
    deduplicate: bool = True
    parts: int = 1
    experts: int = 1
    tokens: int = 4096


def sample_destinations(plan: Plan, load: Load) -> np.ndarray:
    """(S, K) computing slot of each sampled copy, -1 = none.

    Copies of a (source, expert) are spread over its runs as evenly as a sample of them can be; with all tokens in the
    sample, in the order of tokens, this is `plan.destinations`.
    """
    experts = load.counts_RE.shape[1]
    ids = load.ids_SK.reshape(-1)
    kept = np.flatnonzero(ids >= 0)
    source = np.repeat(load.source_S, load.top_k)[kept]
    key = source * experts + ids[kept]
    dest = np.full(ids.size, -1, np.int64)
    slots = np.concatenate(plan.order)
    if plan.one_slot_per_expert:
        dest[kept] = slots[ids[kept]]
        return dest.reshape(load.ids_SK.shape)
    order = np.argsort(key, kind="stable")
    sampled = np.bincount(key, minlength=load.counts_RE.size)
    nth = np.empty(len(key), np.int64)
    nth[order] = np.arange(len(key)) - (np.cumsum(sampled) - sampled)[key[order]]
    here = load.counts_RE.reshape(-1)[key]
    place = ((2 * nth + 1) * here) // (2 * sampled[key])
    first_E = np.concatenate([[0], np.cumsum([len(o) for o in plan.order])])[:-1]
    lengths = plan.flow[:, slots]
    ends = np.cumsum(lengths, axis=1)
    start = (ends - lengths)[source, first_E[ids[kept]]]
    reach = int(ends[:, -1].max(initial=0)) + 1
    run = np.searchsorted(
        (ends + np.arange(plan.ranks)[:, None] * reach).reshape(-1), source * reach + start + place, "right"
    )
    here_or_first = np.where(here > 0, run - source * len(slots), first_E[ids[kept]])
    dest[kept] = slots[here_or_first]
    return dest.reshape(load.ids_SK.shape)


def hits(plan: Plan, load: Load, units: Sequence[int]) -> list[np.ndarray]:
    """Tokens per source and unit with at least one copy there (R, U), for each number of units."""
    dest_SK = sample_destinations(plan, load)
    complete = load.complete()
    found = []
    for u in units:
        unit = np.sort(np.where(dest_SK >= 0, dest_SK // (plan.slots.size // u), -1), axis=1)
        fresh = unit >= 0
        fresh[:, 1:] &= unit[:, 1:] != unit[:, :-1]
        if complete:
            keys = (load.source_S[:, None] * u + unit)[fresh]
            found.append(np.bincount(keys, minlength=plan.ranks * u).reshape(plan.ranks, u))
            continue
        copies_RU = plan.flow.reshape(plan.ranks, u, -1).sum(2)
        seen = np.bincount(unit[unit >= 0], minlength=u)
        distinct = np.bincount(unit[fresh], minlength=u)
        ratio = np.where(seen > 0, distinct / np.maximum(seen, 1), distinct.sum() / max(1, seen.sum()))
        found.append(np.rint(copies_RU * ratio).astype(np.int64))
    return found


def traffic(plan: Plan, load: Load, route: Route, topology: Topology, size: RowSize) -> tuple[Traffic, ...]:
    """The all-to-alls of dispatch, outermost first: those of the transport that `route` names."""
    if route.transport == "groupwise":
        by_rank = plan.flow.reshape(plan.ranks, plan.ranks, -1).sum(2)
        rows = np.array([Slices(sizes[:, None], route.parts).splits for sizes in by_rank])
        return (Traffic("groupwise", rows * size.row),)
    if route.transport == "flat":
        return (Traffic("flat", plan.send_matrix() * size.row),)
    units = level_units(topology)
    if route.deduplicate:
        found = hits(plan, load, units)
        weights, columns = load.top_k * size.weight, load.top_k
    else:
        found = [plan.send_matrix().reshape(plan.ranks, u, -1).sum(2) for u in units]
        weights, columns = 0, 1
    row_bytes = (size.row, size.row + weights)
    depth = route.depth or choose_depth(topology, found, row_bytes[1], _usual(topology, route, load, size))
    return tuple(
        stage_traffic(topology, stage, plan.slots_per_rank, columns, row_bytes)
        for stage in stages(topology, depth, found)
    )


def _usual(topology: Topology, route: Route, load: Load, size: RowSize) -> int:
    """The depth from which an automatic choice starts: the deepest where nothing was measured."""
    if not any(level.within.beta or level.rails.beta for level in topology.levels):
        return topology.depth
    return usual_depth(topology, route.experts, load.top_k, route.tokens, 4 * size.width)


# --- seconds -----------------------------------------------------------------------------------
def all_to_all_seconds(sent_RR: np.ndarray, topology: Topology, number: int, depth: int) -> float:
    """Seconds of stage `number` of an exchange of `depth`: alpha + n beta of its level's line.

    The line was fitted to equal blocks; n is the equal all-to-all that loads the busiest link as this one does. The
    link is a rank's own, or the unit's where its ranks share one. What stays inside a unit goes over the links of
    the levels inside, at the same time.
    """
    if topology.ranks == 1:
        return 0.0
    return topology.link(number, depth).alpha + _occupied(sent_RR, topology, number, depth)


def _occupied(sent_RR: np.ndarray, topology: Topology, number: int, depth: int) -> float:
    """Seconds of the busiest link, without latencies."""
    before = topology.units[number - 1]
    inner = topology.units[number] if number < topology.depth else topology.ranks
    members, fan = topology.ranks // inner, inner // before
    unit = np.arange(topology.ranks) // members
    crossing = np.where(unit[:, None] == unit, 0, sent_RR)
    shared = topology.levels[number - 1].shared
    if shared:
        crossing = crossing.reshape(inner, members, inner, members).sum((1, 3))
    busiest = max(crossing.sum(0).max(initial=0), crossing.sum(1).max(initial=0))
    equal = busiest / ((1 - 1 / fan) * (members if shared else 1))
    seconds = float(equal) * topology.link(number, depth).beta
    if number < topology.depth and number == depth:
        inside = np.where(unit[:, None] == unit, sent_RR, 0)
        seconds = max(seconds, _occupied(inside, topology, number + 1, depth + 1))
    return seconds


@dataclass(frozen=True)
class Passes:
    """Seconds of the four exchanges of a training step: rows and results, then the gradients of each."""

    dispatch: float
    combine: float
    combine_back: float
    dispatch_back: float

    @property
    def total(self) -> float:
        return self.dispatch + self.combine + self.combine_back + self.dispatch_back


def passes(moved: Sequence[Traffic], topology: Topology, weights_apart: bool = False) -> Passes:
    """Of a dispatch that moves this. Ids, and weights of another dtype than rows, are collectives of their own."""
    depth = len(moved)
    out = back = ids = 0.0
    for number, t in enumerate(moved, 1):
        link = topology.link(number, depth)
        one_way = all_to_all_seconds(t.sent, topology, number, depth)
        out += one_way
        back += one_way if t.rows is None else all_to_all_seconds(t.rows, topology, number, depth)
        ids += 0.0 if t.rows is None else link.alpha
    return Passes(out + ids * (1 + weights_apart), back, back, out + ids * weights_apart)


def tensor_bytes(moved: Sequence[Traffic], parts: int) -> float:
    """Bytes that the busiest rank sends inside its tensor group in dispatch and combine of a group-wise exchange.

    An all-gather of what arrives, a reduce-scatter of the results and an all-gather of what comes home.
    """
    rows = moved[0].sent
    return float((parts - 1) * (2 * rows.sum(0).max() + rows.sum(1).max()))
