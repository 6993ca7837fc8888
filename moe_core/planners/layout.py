"""A layout: which expert each slot of each rank holds, for as long as it lasts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Layout:
    """slots (R, C): expert id or -1. An expert may hold several slots, of one rank too: they count as replicas."""

    slots: np.ndarray

    def multiplicity(self, num_experts: int) -> np.ndarray:
        """(E, R) slots of each expert on each rank. ValueError if an expert has none."""
        ranks, width = self.slots.shape
        flat = self.slots.reshape(-1)
        held = flat >= 0
        table = np.zeros((num_experts, ranks), np.int64)
        np.add.at(table, (flat[held], np.repeat(np.arange(ranks), width)[held]), 1)
        missing = np.flatnonzero(table.sum(1) == 0)
        if len(missing):
            raise ValueError(f"expert {missing[0]} is in no slot of the layout; every expert needs at least one")
        return table


def check_slots(num_experts: int, ranks: int, slots_per_rank: int) -> None:
    """ValueError unless every expert can have a slot."""
    if ranks * slots_per_rank < num_experts:
        raise ValueError(
            f"{ranks} ranks x {slots_per_rank} slots cannot hold {num_experts} experts; "
            f"choose at least {-(-num_experts // ranks)} slots per rank"
        )


def tiled_layout(num_experts: int, ranks: int, slots_per_rank: int) -> Layout:
    """LAER's first layout: experts 0..E-1 again and again over the slots in order of rank."""
    check_slots(num_experts, ranks, slots_per_rank)
    return Layout((np.arange(ranks * slots_per_rank) % num_experts).reshape(ranks, slots_per_rank))


def strided_layout(num_experts: int, ranks: int, slots_per_rank: int) -> Layout:
    """Expert parallelism of degree ceil(E / C), replicated: slot j of rank q holds expert j x degree + q mod degree.

    The fixed layout of the fsdp_ep baseline. Slots past the last expert stay empty.
    """
    check_slots(num_experts, ranks, slots_per_rank)
    degree = -(-num_experts // slots_per_rank)
    table = np.arange(slots_per_rank)[None] * degree + (np.arange(ranks) % degree)[:, None]
    return Layout(np.where(table < num_experts, table, -1))
