"""The loop of `lite_routing.route`."""

from __future__ import annotations

import numpy as np

from .compiled import jit


@jit
def route_rows(
    counts_RE: np.ndarray,
    node_R: np.ndarray,
    slots: np.ndarray,
    first: np.ndarray,
    target_S: np.ndarray,
    rotate: bool,
    out: np.ndarray,
) -> None:
    """Add into out (R, targets) the rows that each source sends to the target of each slot."""
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
