"""Plain expert parallelism: every expert is computed by its owner."""

from __future__ import annotations

import numpy as np

from ..plan import RESIDENT, Plan


def owners(num_experts: int, ranks: int) -> np.ndarray:
    """(E,) owner of each expert: contiguous shares, the first E mod R ranks own one more."""
    share, extra = divmod(num_experts, ranks)
    sizes = [share + (r < extra) for r in range(ranks)]
    return np.repeat(np.arange(ranks), sizes)


def slot_table(owner_E: np.ndarray, ranks: int) -> np.ndarray:
    """(R, C) experts of each rank in ascending order, padded with -1."""
    sizes_R = np.bincount(owner_E, minlength=ranks)
    table = np.full((ranks, max(1, int(sizes_R.max(initial=0)))), -1, np.int64)
    by_rank = np.argsort(owner_E, kind="stable")
    rank = owner_E[by_rank]
    table[rank, np.arange(len(rank)) - (np.cumsum(sizes_R) - sizes_R)[rank]] = by_rank
    return table


def plan_static(counts_RE: np.ndarray, slots_RC: np.ndarray) -> Plan:
    """All rows of an expert go to the one slot that `slots_RC` gives it."""
    ranks, num_experts = counts_RE.shape
    flat = slots_RC.reshape(-1)
    slot_of = np.full(num_experts, -1, np.int64)
    slot_of[flat[flat >= 0]] = np.flatnonzero(flat >= 0)
    flow = np.zeros((ranks, flat.size), np.int64)
    flow[:, slot_of] = counts_RE
    return Plan(
        slots=slots_RC,
        weight_from=np.where(slots_RC >= 0, RESIDENT, RESIDENT),
        order=tuple(slot_of[:, None]),
        flow=flow,
        round=np.zeros(flat.size, np.int64),
    )
