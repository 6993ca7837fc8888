"""The row budget of a rank: rounds that keep it, an error that explains it, and a forecast before any row moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..plan import SHARDS, Plan
from .assemble import cut


class RowBudgetError(RuntimeError):
    """A rank would compute more rows than `max_rows_per_rank` allows."""


@dataclass(frozen=True)
class RoundRule:
    """When a layer works in rounds. max_rows: budget of a rank; over: what happens to a plan that exceeds it.

    chunks: rounds of a plan that keeps the budget, one's exchange under another's compute. shape: for the error.
    """

    max_rows: int | None = None
    over: Literal["chunk", "error"] = "chunk"
    chunks: int = 1
    shape: LayerShape | None = None

    def exceeded(self, plan: Plan) -> bool:
        """Whether a rank would compute more rows than it may."""
        return self.max_rows is not None and int(plan.rows_per_rank().max()) > self.max_rows

    def apply(self, plan: Plan) -> Plan:
        """The plan, in rounds where they are wanted; the same number on every rank. RowBudgetError for `error`."""
        if self.max_rows is not None and self.exceeded(plan):
            if self.over == "error":
                raise RowBudgetError(_explain(plan, self.max_rows, self.shape))
            return split_rounds(plan, self.max_rows)
        if self.chunks == 1:
            return plan
        return split_rounds(plan, max(1, -(-int(plan.rows_per_rank().max()) // self.chunks)))


def _explain(plan: Plan, max_rows: int, shape: LayerShape | None) -> str:
    rank = int(plan.rows_per_rank().argmax())
    rows_C = plan.rows_per_slot(rank)
    slot = int(rows_C.argmax())
    held = "" if shape is None else f" ({forecast(plan, shape).peak[rank] / 2**30:.3g} GiB with its weights)"
    return (
        f"rank {rank} would compute {int(rows_C.sum())} rows{held}, {int(rows_C[slot])} of them of expert "
        f"{int(plan.slots[rank, slot])}, more than max_rows_per_rank={max_rows}; raise it, set over_budget=chunk, "
        "or spread rows with planner least_loaded or relayout"
    )


def split_rounds(plan: Plan, max_rows: int) -> Plan:
    """The same rows on the same ranks in ceil(busiest rank's rows / max_rows) rounds, the same number everywhere.

    A rank's rows, slot by slot, are cut at every multiple of max_rows. A slot that a cut goes through continues in
    an extra slot behind the rank's others, with the same expert and `weight_from`, next in `order`: so the runs
    stay what they were, and within a slot earlier sources come first. Plans that fit are returned as they are.
    """
    if max_rows < 1:
        raise ValueError(f"max_rows_per_rank={max_rows} lets no row through; choose at least 1")
    if int(plan.rows_per_rank().max()) <= max_rows:
        return plan
    ranks, width = plan.slots.shape
    pieces = _pieces(plan, max_rows)
    extra = np.flatnonzero(pieces.continued)
    rank = pieces.slot[extra] // width
    nth = np.arange(len(extra)) - np.searchsorted(rank, rank)
    new_width = width + int(nth.max(initial=-1)) + 1
    place = pieces.slot // width * new_width + pieces.slot % width
    place[extra] = rank * new_width + width + nth
    slots = np.full(ranks * new_width, -1, np.int64)
    slots[place] = plan.slots.reshape(-1)[pieces.slot]
    weight_from = np.full(ranks * new_width, int(plan.weight_from.min()), np.int64)
    weight_from[place] = plan.weight_from.reshape(-1)[pieces.slot]
    flow = np.zeros((ranks, ranks * new_width), np.int64)
    flow[:, place] = cut(plan.flow, pieces.slot, pieces.rows)
    round_S = np.zeros(ranks * new_width, np.int64)
    round_S[place] = pieces.round
    first = np.searchsorted(pieces.slot, np.arange(ranks * width + 1))
    return Plan(
        slots=slots.reshape(ranks, new_width),
        weight_from=weight_from.reshape(ranks, new_width),
        order=tuple(np.concatenate([place[first[s] : first[s + 1]] for s in order]) for order in plan.order),
        flow=flow,
        round=round_S,
    )


@dataclass(frozen=True, eq=False)
class _Pieces:
    """Parts of slots in order of slot: the slot, rows, round; whether it continues a slot's earlier piece."""

    slot: np.ndarray
    rows: np.ndarray
    round: np.ndarray
    continued: np.ndarray


def _pieces(plan: Plan, max_rows: int) -> _Pieces:
    rows_RC = plan.flow.sum(0).reshape(plan.ranks, -1)
    end = np.cumsum(rows_RC, axis=1).reshape(-1)
    rows = rows_RC.reshape(-1)
    start = end - rows
    parts = np.maximum(1, -(-end // max_rows) - start // max_rows)
    slot = np.repeat(np.arange(rows.size), parts)
    nth = np.arange(slot.size) - np.repeat(np.cumsum(parts) - parts, parts)
    low = np.maximum(start[slot], (start[slot] // max_rows + nth) * max_rows)
    high = np.minimum(end[slot], (start[slot] // max_rows + nth + 1) * max_rows)
    filled = high > low
    return _Pieces(slot, high - low, np.where(filled, low // max_rows, 0), nth > 0)


def round_plan(split: Plan, number: int) -> Plan:
    """One round of a split plan on the slots it had before it was split, so that weights are where they were.

    A source's rows of this round are those that `destinations(split, ...)` puts into slots of the round; among them
    `destinations(round_plan(split, number), ...)` names the slots of the plan before the split.
    """
    ranks, width = split.slots.shape
    first = weight_slots(split)
    repeated = (first != np.arange(width)) & (split.slots >= 0)
    kept = width - int(repeated.sum(1).max())
    target = (np.arange(ranks)[:, None] * kept + np.where(repeated, first, np.arange(width))).reshape(-1)
    used = np.flatnonzero((split.round == number) & (split.flow > 0).any(0))
    flow = np.zeros((ranks, ranks * kept), np.int64)
    flow[:, target[used]] = split.flow[:, used]
    return Plan(
        slots=split.slots[:, :kept],
        weight_from=split.weight_from[:, :kept],
        order=tuple(target[order[~repeated.reshape(-1)[order]]] for order in split.order),
        flow=flow,
        round=np.zeros(ranks * kept, np.int64),
    )


def weight_slots(plan: Plan) -> np.ndarray:
    """(R, C) for each slot the first slot of its rank with the same expert: whose weights it shares."""
    return (plan.slots[:, :, None] == plan.slots[:, None, :]).argmax(2)


@dataclass(frozen=True)
class LayerShape:
    """One MoE layer: experts of `matrices` matrices hidden_size x expert_hidden_size (SwiGLU 3, GELU 2)."""

    num_experts: int
    hidden_size: int
    expert_hidden_size: int
    top_k: int
    bytes_per_element: int = 2
    matrices: int = 3

    @property
    def expert_bytes(self) -> int:
        return self.matrices * self.hidden_size * self.expert_hidden_size * self.bytes_per_element

    @property
    def row_flops(self) -> int:
        """One row through its expert, forward."""
        return 2 * self.matrices * self.hidden_size * self.expert_hidden_size

    @property
    def row_bytes(self) -> int:
        """One row on the wire, one way."""
        return self.hidden_size * self.bytes_per_element

    @property
    def activation_bytes(self) -> int:
        """One row while its expert runs forward: input, output, and one inner row per matrix."""
        return (2 * self.hidden_size + self.matrices * self.expert_hidden_size) * self.bytes_per_element


@dataclass(frozen=True, eq=False)
class Forecast:
    """What a plan needs, per rank (R,), known before a row has moved.

    rows: computed; rounds: of all ranks; sent, received: bytes of dispatch between ranks (combine is the reverse);
    weights_sent, weights_received: bytes of expert weights; peak: bytes of weights at hand and of one round's
    activations in forward.
    """

    rows: np.ndarray
    rounds: int
    sent: np.ndarray
    received: np.ndarray
    weights_sent: np.ndarray
    weights_received: np.ndarray
    peak: np.ndarray


def forecast(plan: Plan, shape: LayerShape, max_rows: int | None = None) -> Forecast:
    """Rows, bytes and peak memory of a plan (before it is split) under a row budget."""
    rows_R = plan.rows_per_rank()
    crossing_RR = plan.send_matrix() * (1 - np.eye(plan.ranks, dtype=np.int64))
    held_R, lent_R, fetched_R = _weights(plan, shape)
    at_once_R = rows_R if max_rows is None else np.minimum(rows_R, max_rows)
    return Forecast(
        rows=rows_R,
        rounds=1 if max_rows is None else max(1, -(-int(rows_R.max()) // max_rows)),
        sent=crossing_RR.sum(1) * shape.row_bytes,
        received=crossing_RR.sum(0) * shape.row_bytes,
        weights_sent=lent_R,
        weights_received=fetched_R,
        peak=held_R + at_once_R * shape.activation_bytes,
    )


def _weights(plan: Plan, shape: LayerShape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes of weights on each rank, sent by it, received by it.

    Sharded: 1/R of every expert at rest and C slots unsharded, whatever is in them, R - 1 of R parts from others.
    """
    ranks, width = plan.slots.shape
    if (plan.weight_from == SHARDS).any():
        at_rest = -(-shape.num_experts * shape.expert_bytes // ranks)
        gathered = width * shape.expert_bytes
        moved = np.full(ranks, gathered * (ranks - 1) // ranks, np.int64)
        return np.full(ranks, at_rest + gathered, np.int64), moved, moved
    lender = plan.weight_from[plan.weight_from >= 0]
    held, lent, borrowed = (
        (plan.slots >= 0).sum(1),
        np.bincount(lender, minlength=ranks),
        (plan.weight_from >= 0).sum(1),
    )
    return held * shape.expert_bytes, lent * shape.expert_bytes, borrowed * shape.expert_bytes
