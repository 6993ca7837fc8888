"""LocMoE's and PanGu-Sigma's group-wise all-to-all (arXiv 2401.13920, section 3.2), for tensor-parallel groups.

Ranks of a tensor group hold the same tokens. Each sends a 1/t slice of the rows over its own expert group, and an
all-gather inside the tensor group rebuilds them: bytes move from links between groups to links inside. Blocks of rows
are padded to multiples of t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ...backends.protocol import Array, Communicator, Group, Ops
from ..plan import Plan
from ..routing.base import Routing
from .base import Exchange, Traffic
from .flat import device_destinations, slot_order
from .hierarchical import BYTES

Padding = Literal["destination", "slot"]
"""What is padded to a multiple of t: a source's rows for a rank, or for a slot (a capacity buffer's way)."""


@dataclass(frozen=True)
class Slices:
    """Blocks of rows of several groups, each cut into t slices; integers on the host.

    sizes (G, B): rows of block b for (or from) group member g.
    """

    sizes: np.ndarray
    parts: int

    @property
    def slice_rows(self) -> np.ndarray:
        """(G, B) rows of one slice, padding included."""
        return -(-self.sizes // self.parts)

    @property
    def splits(self) -> list[int]:
        """Rows of one slice per member."""
        return self.slice_rows.sum(1).tolist()

    def rows_of_slice(self, part: int) -> np.ndarray:
        """For each row of a slice, its place among all rows in order; -1 = padding."""
        share = self.slice_rows.reshape(-1)
        sizes = self.sizes.reshape(-1)
        block = np.repeat(np.arange(len(share)), share)
        inside = np.arange(share.sum()) - np.repeat(np.cumsum(share) - share, share) + part * share[block]
        first = np.cumsum(sizes) - sizes
        return np.where(inside < sizes[block], first[block] + inside, -1)

    def rows_of_all(self) -> np.ndarray:
        """The same for the slices of all parts, one after the other."""
        return np.concatenate([self.rows_of_slice(part) for part in range(self.parts)])


@dataclass(frozen=True)
class Cut:
    """What combine needs: slices sent and received, the order of rows, places of arrivals."""

    sent: Slices
    received: Slices
    to_send: Array
    from_slots: Array
    to_slots: Array


class Groupwise:
    """dispatch: slice, all-to-all over the expert group, all-gather over the tensor group; combine: the reverse.

    replicated: every tensor rank computes whole experts and returns its slice of their output; otherwise experts are
    cut over the group and a reduce-scatter sums their parts.
    """

    def __init__(
        self,
        ops: Ops,
        comm: Communicator,
        group: Group,
        tensor: Group,
        replicated: bool = False,
        padding: Padding = "destination",
    ) -> None:
        self._ops, self._comm, self._group, self._tensor = ops, comm, group, tensor
        self._replicated, self._padding = replicated, padding

    def dispatch(self, x_TD: Array, routing: Routing, plan: Plan | None) -> tuple[Array, Exchange]:
        assert plan is not None
        rows, exchange = self._leaving(x_TD, routing, plan)
        cut = exchange.extra
        rows = self._comm.all_to_all(rows, self._group, cut.sent.splits, cut.received.splits)
        return self._in_slots(rows, cut), exchange

    def dispatch_start(self, x_TD: Array, routing: Routing, plan: Plan) -> tuple[Any, Exchange]:
        rows, exchange = self._leaving(x_TD, routing, plan)
        cut = exchange.extra
        return self._comm.all_to_all_start(rows, self._group, cut.sent.splits, cut.received.splits), exchange

    def dispatch_finish(self, started: tuple[Any, Exchange]) -> tuple[Array, Exchange]:
        under_way, exchange = started
        return self._in_slots(self._comm.all_to_all_finish(under_way), exchange.extra), exchange

    def combine(self, rows_ND: Array, weights_TK: Array, exchange: Exchange) -> Array:
        parts, cut = self._own_slice(rows_ND, exchange), exchange.extra
        parts = self._comm.all_to_all(parts, self._group, cut.received.splits, cut.sent.splits)
        return self._weighed(parts, weights_TK, exchange)

    def combine_start(self, rows_ND: Array, exchange: Exchange) -> Any:
        parts, cut = self._own_slice(rows_ND, exchange), exchange.extra
        return self._comm.all_to_all_start(parts, self._group, cut.received.splits, cut.sent.splits)

    def combine_finish(self, started: Any, weights_TK: Array, exchange: Exchange) -> Array:
        return self._weighed(self._comm.all_to_all_finish(started), weights_TK, exchange)

    def _leaving(self, x_TD: Array, routing: Routing, plan: Plan) -> tuple[Array, Exchange]:
        """(this rank's slice of the rows by destination, the exchange)."""
        ops, me, top_k = self._ops, self._group.index, routing.ids_TK.shape[1]
        dest_TK = device_destinations(ops, routing.ids_TK, plan, me)
        order = ops.argsort(ops.where(dest_TK >= 0, dest_TK, plan.slots.size).reshape((-1,)))
        cut = self._cut(plan)
        position = ops.where(dest_TK >= 0, ops.invert(order).reshape(dest_TK.shape), -1)
        counts = ops.asarray(plan.rows_per_slot(me))
        inside = self._inside(cut, x_TD)
        exchange = Exchange(position, counts, traffic=(self._traffic(plan, x_TD),), tensor_bytes=inside, extra=cut)
        return ops.take_rows(x_TD, self._tokens_to_send(order, cut, top_k)), exchange

    def _in_slots(self, rows: Array, cut: Cut) -> Array:
        """Arrived slices of all tensor ranks as whole rows, slot by slot."""
        return self._ops.take_rows(self._comm.all_gather(rows, self._tensor), cut.to_slots)

    def _own_slice(self, rows_ND: Array, exchange: Exchange) -> Array:
        """This tensor rank's slice of the results, by source."""
        ops, cut = self._ops, exchange.extra
        parts = ops.take_rows(rows_ND, cut.from_slots)
        if self._replicated:
            share = sum(cut.received.splits)
            return ops.split(parts, [share] * self._tensor.size)[self._tensor.index]
        return self._comm.reduce_scatter(parts, self._tensor)

    def _weighed(self, parts: Array, weights_TK: Array, exchange: Exchange) -> Array:
        rows = self._comm.all_gather(parts, self._tensor)
        return self._ops.combine_rows(rows, self._returned(exchange.position_TK, exchange.extra), weights_TK)

    def _cut(self, plan: Plan) -> Cut:
        ops, me = self._ops, self._group.index
        sent, received = self._slices(plan.flow[me], plan), self._slices_from(plan)
        arrival = _arrival(plan, me, received)
        back = np.full(sum(received.splits) * received.parts, -1, np.int64)
        back[arrival] = np.arange(len(arrival))
        to_send = ops.asarray(sent.rows_of_slice(self._tensor.index))
        return Cut(sent, received, to_send, ops.asarray(back), ops.asarray(arrival))

    def _slices(self, flow_S: np.ndarray, plan: Plan) -> Slices:
        """What a source sends, by destination."""
        by_rank = flow_S.reshape(plan.ranks, -1)
        return Slices(by_rank.sum(1, keepdims=True) if self._padding == "destination" else by_rank, self._tensor.size)

    def _slices_from(self, plan: Plan) -> Slices:
        """What this rank receives, by source."""
        mine = plan.flow.reshape(plan.ranks, plan.ranks, -1)[:, self._group.index]
        return Slices(mine.sum(1, keepdims=True) if self._padding == "destination" else mine, self._tensor.size)

    def _tokens_to_send(self, order: Array, cut: Cut, top_k: int) -> Array:
        copies = self._ops.take_rows(order, cut.to_send)
        return self._ops.where(cut.to_send >= 0, copies // top_k, -1)

    def _returned(self, position_TK: Array, cut: Cut) -> Array:
        """Row of each copy among the gathered slices."""
        ops = self._ops
        places = _inverse(cut.sent)
        flat = ops.take_rows(ops.asarray(places), position_TK.reshape((-1,))).reshape(position_TK.shape)
        return ops.where(position_TK >= 0, flat, -1)

    def _inside(self, cut: Cut, x_TD: Array) -> tuple[int, int]:
        """Bytes of dispatch's all-gather; of combine's reduce-scatter (not where experts are whole) and all-gather."""
        block = (self._tensor.size - 1) * self._row_bytes(x_TD)
        arriving, leaving = sum(cut.received.splits), sum(cut.sent.splits)
        return block * arriving, block * (leaving + (0 if self._replicated else arriving))

    def _row_bytes(self, x_TD: Array) -> int:
        return x_TD.shape[1] * BYTES[self._ops.dtype_of(x_TD)]

    def _traffic(self, plan: Plan, x_TD: Array) -> Traffic:
        rows = np.array([self._slices(flow, plan).splits for flow in plan.flow])
        return Traffic("groupwise", rows * self._row_bytes(x_TD))


def _inverse(slices: Slices) -> np.ndarray:
    """For each row in order, its place among the slices of all parts."""
    places = slices.rows_of_all()
    inverse = np.zeros(int(slices.sizes.sum()), np.int64)
    kept = np.flatnonzero(places >= 0)
    inverse[places[kept]] = kept
    return inverse


def _arrival(plan: Plan, me: int, received: Slices) -> np.ndarray:
    """For each row in slot order, its place among the gathered slices."""
    by_source = _inverse(received)
    in_slots = slot_order(plan, me)
    return by_source if in_slots is None else by_source[in_slots]
