"""Rows per expert and rank -> Plan: slots, order of the runs, and which source's rows go where."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..plan import RESIDENT, Plan


@dataclass(frozen=True, eq=False)
class Segments:
    """Pieces of experts by (expert, turn), the owner's piece first, even when it is empty.

    expert, rank, rows: (G,) each; first_E (E + 1,): where each expert's pieces start. A rank holds at most one
    piece of an expert.
    """

    expert: np.ndarray
    rank: np.ndarray
    rows: np.ndarray
    first_E: np.ndarray

    @classmethod
    def of(cls, rows_ER: np.ndarray, turn_ER: np.ndarray, owner_E: np.ndarray) -> Segments:
        """From the tables of `spill.assign`."""
        num_experts = len(owner_E)
        helped, helper = np.nonzero(turn_ER)
        expert = np.concatenate([np.arange(num_experts), helped])
        rank = np.concatenate([owner_E, helper])
        turn = np.concatenate([np.zeros(num_experts, np.int64), turn_ER[helped, helper]])
        by_turn = np.lexsort((turn, expert))
        expert, rank = expert[by_turn], rank[by_turn]
        first_E = np.concatenate([[0], np.cumsum(np.bincount(expert, minlength=num_experts))])
        return cls(expert, rank, rows_ER[expert, rank], first_E)


def owner_of(owned_RC: np.ndarray, num_experts: int) -> np.ndarray:
    """(E,) owner of each expert from the table of owned experts (-1 = padding, after a rank's experts).

    ValueError unless each expert is named exactly once and padding comes last.
    """
    rank, column = np.nonzero(owned_RC >= 0)
    held = owned_RC[rank, column]
    dense = (column < (owned_RC >= 0).sum(1)[rank]).all()
    if not dense or len(held) != num_experts or (np.bincount(held, minlength=num_experts) != 1).any():
        raise ValueError(
            f"the table of owned experts must name each of {num_experts} experts once, padding last; "
            "build it with planners.static.slot_table"
        )
    owner_E = np.empty(num_experts, np.int64)
    owner_E[held] = rank
    return owner_E


def slot_columns(segments: Segments, owned_RC: np.ndarray) -> np.ndarray:
    """(G,) slot of each piece on its rank: owned experts where they are, borrowed ones after them by expert id."""
    native = np.zeros(len(segments.expert), bool)
    native[segments.first_E[:-1]] = True
    column = np.empty(len(segments.expert), np.int64)
    owned_rank, owned_column = np.nonzero(owned_RC >= 0)
    column[segments.first_E[owned_RC[owned_rank, owned_column]]] = owned_column
    foreign = np.flatnonzero(~native)
    foreign = foreign[np.lexsort((segments.expert[foreign], segments.rank[foreign]))]
    rank = segments.rank[foreign]
    first = np.searchsorted(rank, rank)
    column[foreign] = (owned_RC >= 0).sum(1)[rank] + np.arange(len(foreign)) - first
    return column


def cut(supply_RE: np.ndarray, expert_G: np.ndarray, demand_G: np.ndarray) -> np.ndarray:
    """(R, G) overlaps of sources' and pieces' intervals when both lie end to end in order, expert by expert.

    Pieces are sorted by expert. Where supply and demand of an expert differ, the smaller one is used up.
    """
    after = np.cumsum(supply_RE, axis=0)
    before = after - supply_RE
    end = np.cumsum(demand_G)
    start = end - demand_G
    base = start[np.searchsorted(expert_G, expert_G)] if len(expert_G) else start
    low, high = before[:, expert_G], after[:, expert_G]
    np.maximum(low, start - base, out=low)
    np.minimum(high, end - base, out=high)
    high -= low
    return np.maximum(high, 0, out=high)


def source_first(counts_RE: np.ndarray, segments: Segments, node_R: np.ndarray) -> np.ndarray:
    """(R, G) rows from each source to each piece: as many as possible stay on their rank, then on their node.

    Both are largest at once: after a node's ranks have kept what they can, what is left of its supply still meets
    what is left of its demand. The remainder goes end to end, in order of rank and piece.
    """
    expert, rank = segments.expert, segments.rank
    stay = np.minimum(counts_RE[rank, expert], segments.rows)
    flow = np.zeros((len(counts_RE), len(expert)), np.int64)
    flow[rank, np.arange(len(expert))] = stay
    supply = counts_RE.copy()
    supply[rank, expert] -= stay
    demand = segments.rows - stay
    for node in np.unique(node_R) if (node_R != node_R[0]).any() else ():
        here, pieces = np.flatnonzero(node_R == node), np.flatnonzero(node_R[rank] == node)
        moved = cut(supply[here], expert[pieces], demand[pieces])
        flow[np.ix_(here, pieces)] += moved
        demand[pieces] -= moved.sum(0)
        for source, row in zip(here, moved):
            supply[source] -= np.bincount(expert[pieces], row, counts_RE.shape[1]).astype(np.int64)
    return flow + cut(supply, expert, demand)


def build(segments: Segments, flow_RG: np.ndarray, owned_RC: np.ndarray, slots_per_rank: int | None = None) -> Plan:
    """The Plan of these pieces; borrowed slots name the owner in `weight_from`.

    slots_per_rank: C of the plan, at least what the pieces need; None = exactly that.
    """
    ranks, owned_width = owned_RC.shape
    column = slot_columns(segments, owned_RC)
    width = max(owned_width, int(column.max(initial=-1)) + 1, slots_per_rank or 0)
    slot = segments.rank * width + column
    slots = np.full(ranks * width, -1, np.int64)
    slots[slot] = segments.expert
    owner = np.repeat(segments.rank[segments.first_E[:-1]], np.diff(segments.first_E))
    weight_from = np.full(ranks * width, RESIDENT, np.int64)
    weight_from[slot] = np.where(owner == segments.rank, RESIDENT, owner)
    flow = np.zeros((ranks, ranks * width), np.int64)
    flow[:, slot] = flow_RG
    bounds = segments.first_E.tolist()
    return Plan(
        slots=slots.reshape(ranks, width),
        weight_from=weight_from.reshape(ranks, width),
        order=tuple(slot[a:b] for a, b in pairwise(bounds)),
        flow=flow,
        round=np.zeros(ranks * width, np.int64),
    )
