"""One all-to-all of one row per (token, expert) pair; and `local`, where nothing travels."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...backends.protocol import Array, Communicator, Group, Ops
from ..plan import Plan, runs
from ..routing.base import Routing
from .base import Exchange, Traffic


class Local:
    """A group of one rank: rows are sorted by expert; no collective, no copy to the host."""

    def __init__(self, ops: Ops, num_experts: int) -> None:
        self._ops, self._num_experts = ops, num_experts

    def dispatch(self, x_TD: Array, routing: Routing, plan: Plan | None) -> tuple[Array, Exchange]:
        ops, ids = self._ops, routing.ids_TK
        top_k = ids.shape[1]
        keys = ops.where(ids >= 0, ids, self._num_experts).reshape((-1,))
        order = ops.argsort(keys)
        dropped = ops.take_rows(keys, order) >= self._num_experts
        rows = ops.take_rows(x_TD, ops.where(dropped, -1, order // top_k))
        position = ops.where(ids >= 0, ops.invert(order).reshape(ids.shape), -1)
        return rows, Exchange(position, ops.count(ids, self._num_experts))

    def combine(self, rows_ND: Array, weights_TK: Array, exchange: Exchange) -> Array:
        return self._ops.combine_rows(rows_ND, exchange.position_TK, weights_TK)


class Flat:
    """Rows sorted by global slot go to the slot's rank by one uneven all-to-all; combine weighs at home."""

    def __init__(self, ops: Ops, comm: Communicator, group: Group) -> None:
        self._ops, self._comm, self._group = ops, comm, group

    def dispatch(self, x_TD: Array, routing: Routing, plan: Plan | None) -> tuple[Array, Exchange]:
        assert plan is not None
        rows, exchange = self._leaving(x_TD, routing, plan)
        rows = self._comm.all_to_all(rows, self._group, exchange.send_splits, exchange.recv_splits)
        return self._in_slots(rows, exchange), exchange

    def dispatch_start(self, x_TD: Array, routing: Routing, plan: Plan) -> tuple[Any, Exchange]:
        rows, exchange = self._leaving(x_TD, routing, plan)
        return self._comm.all_to_all_start(rows, self._group, exchange.send_splits, exchange.recv_splits), exchange

    def dispatch_finish(self, started: tuple[Any, Exchange]) -> tuple[Array, Exchange]:
        under_way, exchange = started
        return self._in_slots(self._comm.all_to_all_finish(under_way), exchange), exchange

    def combine(self, rows_ND: Array, weights_TK: Array, exchange: Exchange) -> Array:
        rows_ND = self._by_source(rows_ND, exchange)
        rows_ND = self._comm.all_to_all(rows_ND, self._group, exchange.recv_splits, exchange.send_splits)
        return self._ops.combine_rows(rows_ND, exchange.position_TK, weights_TK)

    def combine_start(self, rows_ND: Array, exchange: Exchange) -> Any:
        rows_ND = self._by_source(rows_ND, exchange)
        return self._comm.all_to_all_start(rows_ND, self._group, exchange.recv_splits, exchange.send_splits)

    def combine_finish(self, started: Any, weights_TK: Array, exchange: Exchange) -> Array:
        rows_ND = self._comm.all_to_all_finish(started)
        return self._ops.combine_rows(rows_ND, exchange.position_TK, weights_TK)

    def _leaving(self, x_TD: Array, routing: Routing, plan: Plan) -> tuple[Array, Exchange]:
        """(rows by destination, the exchange)."""
        ops, group, top_k = self._ops, self._group, routing.ids_TK.shape[1]
        dest_TK = device_destinations(ops, routing.ids_TK, plan, group.index)
        num_slots = plan.slots.size
        order = ops.argsort(ops.where(dest_TK >= 0, dest_TK, num_slots).reshape((-1,)))
        sent = int(plan.flow[group.index].sum())
        kept = ops.split(order, [sent, order.shape[0] - sent])[0]
        position_TK = ops.where(dest_TK >= 0, ops.invert(order).reshape(dest_TK.shape), -1)
        return ops.take_rows(x_TD, kept // top_k), self._exchange(position_TK, plan, x_TD)

    def _in_slots(self, rows: Array, exchange: Exchange) -> Array:
        return rows if exchange.to_slots is None else self._ops.take_rows(rows, exchange.to_slots)

    def _by_source(self, rows_ND: Array, exchange: Exchange) -> Array:
        return rows_ND if exchange.from_slots is None else self._ops.take_rows(rows_ND, exchange.from_slots)

    def _exchange(self, position_TK: Array, plan: Plan, x_TD: Array) -> Exchange:
        ops, me = self._ops, self._group.index
        matrix = plan.send_matrix()
        to_slots = slot_order(plan, me)
        row_bytes = x_TD.shape[1] * _BYTES[ops.dtype_of(x_TD)]
        return Exchange(
            position_TK=position_TK,
            counts_C=ops.asarray(plan.rows_per_slot(me)),
            send_splits=tuple(matrix[me].tolist()),
            recv_splits=tuple(matrix[:, me].tolist()),
            to_slots=None if to_slots is None else ops.asarray(to_slots),
            from_slots=None if to_slots is None else ops.asarray(np.argsort(to_slots)),
            traffic=(Traffic("flat", matrix * row_bytes),),
        )


_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def slot_order(plan: Plan, rank: int) -> np.ndarray | None:
    """Rows arrive ordered by (source, slot); the permutation to (slot, source), or None if they are the same."""
    arriving = plan.flow.reshape(plan.ranks, plan.ranks, -1)[:, rank]  # (source, slot)
    if arriving.shape[1] == 1:
        return None
    starts = np.cumsum(arriving.reshape(-1)).reshape(arriving.shape) - arriving
    blocks = [np.arange(s, s + n) for s, n in zip(starts.T.reshape(-1), arriving.T.reshape(-1), strict=True) if n]
    return np.concatenate(blocks) if blocks else np.zeros(0, np.int64)


def device_destinations(ops: Ops, ids_TK: Array, plan: Plan, source: int) -> Array:
    """dest_TK: global slot of each copy, -1 dropped. A table look-up where every expert has one slot."""
    if plan.one_slot_per_expert:
        table = ops.asarray(np.append(np.concatenate(plan.order), -1))
        index = ops.where(ids_TK >= 0, ids_TK, len(plan.order)).reshape((-1,))
        return ops.take_rows(table, index).reshape(ids_TK.shape)
    keys = ops.where(ids_TK >= 0, ids_TK, len(plan.order)).reshape((-1,))
    slots, lengths = runs(plan, source)
    dropped = np.full(ids_TK.shape[0] * ids_TK.shape[1] - int(lengths.sum()), -1, np.int64)
    in_expert_order = ops.asarray(np.concatenate([np.repeat(slots, lengths), dropped]))
    return ops.take_rows(in_expert_order, ops.invert(ops.argsort(keys))).reshape(ids_TK.shape)
