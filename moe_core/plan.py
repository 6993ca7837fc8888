"""A Plan says which rank computes which rows with which weights. Integers only, the same on every rank.

Ranks here are coordinates in the expert-parallel group. A global slot is `rank * C + slot on that rank`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESIDENT = -1
"""`weight_from`: the rank's own parameters."""
SHARDS = -2
"""`weight_from`: gathered from the shards of all ranks."""
DROPPED = -1
"""`dest`: this copy of the token is computed nowhere."""


@dataclass(frozen=True, eq=False)
class Plan:
    """slots (R, C): expert id or -1; weight_from (R, C): rank, RESIDENT or SHARDS.

    order[e]: global slots of expert e, in the order in which a source's rows of e are cut into runs.
    flow (R, R*C): rows from a source rank to a global slot. round (R*C,): in which round a slot is computed.
    """

    slots: np.ndarray
    weight_from: np.ndarray
    order: tuple[np.ndarray, ...]
    flow: np.ndarray
    round: np.ndarray

    @property
    def ranks(self) -> int:
        return self.slots.shape[0]

    @property
    def slots_per_rank(self) -> int:
        return self.slots.shape[1]

    @property
    def rounds(self) -> int:
        return int(self.round.max(initial=0)) + 1

    @property
    def one_slot_per_expert(self) -> bool:
        return all(len(o) == 1 for o in self.order)

    def rows_per_rank(self) -> np.ndarray:
        """(R,) rows that each rank computes."""
        return self.flow.sum(0).reshape(self.ranks, -1).sum(1)

    def send_matrix(self) -> np.ndarray:
        """(R, R) rows from source (row) to computing rank (column)."""
        return self.flow.reshape(self.ranks, self.ranks, -1).sum(2)

    def rows_per_slot(self, rank: int) -> np.ndarray:
        """(C,) rows in each slot of a rank."""
        return self.flow.sum(0).reshape(self.ranks, -1)[rank]

    def check(self, counts_RE: np.ndarray) -> None:
        """Raise AssertionError unless the laws hold: rows conserved, runs partition, slots named once."""
        flat = self.slots.reshape(-1)
        assert self.flow.min(initial=0) >= 0
        assert (self.flow[:, flat < 0] == 0).all(), "rows sent to an empty slot"
        for e, order in enumerate(self.order):
            assert (flat[order] == e).all(), f"order[{e}] names a slot of another expert"
            assert len(set(order.tolist())) == len(order)
            np.testing.assert_array_equal(self.flow[:, order].sum(1), counts_RE[:, e])
        assert self.flow.sum() == counts_RE.sum()


def runs(plan: Plan, source: int) -> tuple[np.ndarray, np.ndarray]:
    """A source's rows in (expert, run) order: (global slot of each run, its rows)."""
    slots = np.concatenate(plan.order) if plan.order else np.zeros(0, np.int64)
    return slots, plan.flow[source, slots]


def destinations(plan: Plan, source: int, ids_N: np.ndarray) -> np.ndarray:
    """Host form of dest (N,): global slot of each kept copy in (token, k) order; id < 0 is DROPPED."""
    dest = np.full(len(ids_N), DROPPED, np.int64)
    kept = np.flatnonzero(ids_N >= 0)
    by_expert = kept[np.argsort(ids_N[kept], kind="stable")]
    dest[by_expert] = np.repeat(*runs(plan, source))
    return dest
