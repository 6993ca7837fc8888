"""Counts and a Layout -> flows, by LAER's local rule: a source uses the replicas of its own node, if there are any."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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
    from .route_kernel import route_rows

    out = np.zeros((len(counts_RE), width), np.int64)
    route_rows(counts_RE, index.node_R, index.slots, index.first, target_S, rotate, out)
    return out
