"""Counts and a Layout -> flows, by LAER's local rule: a source uses the replicas of its own node, if there are any."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .compiled import jit
from .layout import Layout


@dataclass(frozen=True, eq=False)
class SlotIndex:
    """Slots of a layout by (expert, node, slot): node n's slots of e are slots[first[e * nodes + n]:first[... + 1]]."""

    slots: np.ndarray
    first: np.ndarray
    node_R: np.ndarray

    @classmethod
    def of(cls, layout: Layout, num_experts: int, node_R: np.ndarray) -> SlotIndex:
        """ValueError if an expert has no slot."""
        layout.multiplicity(num_experts)
        names, node_R = np.unique(node_R, return_inverse=True)
        flat = layout.slots.reshape(-1)
        held = np.flatnonzero(flat >= 0)
        key = flat[held] * len(names) + node_R[held // layout.slots.shape[1]]
        by_key = np.argsort(key, kind="stable")
        first = np.searchsorted(key[by_key], np.arange(num_experts * len(names) + 1))
        return cls(held[by_key], first, node_R)


def route(counts_RE: np.ndarray, index: SlotIndex, target_S: np.ndarray, width: int, rotate: bool) -> np.ndarray:
    """(R, width) rows from each source to each target; target_S names the target of each slot.

    A source's rows of an expert are split evenly over the expert's slots on its node, or over all of them if its
    node has none. Rows that do not divide go one each to the first slots; with `rotate` the first one is
    (source + expert) mod slots, so that they do not pile up.
    """
    out = np.zeros((len(counts_RE), width), np.int64)
    _route(counts_RE, index.node_R, index.slots, index.first, target_S, rotate, out)
    return out


@jit
def _route(
    counts_RE: np.ndarray,
    node_R: np.ndarray,
    slots: np.ndarray,
    first: np.ndarray,
    target_S: np.ndarray,
    rotate: bool,
    out: np.ndarray,
) -> None:
    ranks, num_experts = counts_RE.shape
    nodes = (first.size - 1) // num_experts
    for source in range(ranks):
        for e in range(num_experts):
            rows = counts_RE[source, e]
            if rows == 0:
                continue
            low = first[e * nodes + node_R[source]]
            high = first[e * nodes + node_R[source] + 1]
            if low == high:
                low = first[e * nodes]
                high = first[(e + 1) * nodes]
            width = high - low
            share = rows // width
            extra = rows - share * width
            start = (source + e) % width if rotate else 0
            if share > 0:
                for s in range(low, high):
                    out[source, target_S[slots[s]]] += share
            for i in range(extra):
                out[source, target_S[slots[low + (start + i) % width]]] += 1
