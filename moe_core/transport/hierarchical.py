"""HierMoE's exchange (arXiv 2508.09591): one copy of a token per group that it hits, level by level.

Ids and weights ride along, so that a computing rank sums its experts' weighted outputs and every forwarder sums
what returns to it. Without deduplication it is Tutel's two-dimensional exchange: aggregated messages, K copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...backends.protocol import Array, Communicator, Group, Ops
from ..mesh import Mesh
from ..plan import Plan
from ..routing.base import Routing
from ..topology import Topology
from .base import Exchange, Traffic
from .depth import Stage, choose_depth, level_units, stages
from .flat import device_destinations
from .packing import pack, unpack, words

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
StageGroups = Mapping[tuple[int, bool], Group]
"""Groups by (stage, whether it is the last of its exchange)."""


@dataclass(frozen=True)
class Hierarchy:
    """What the exchange knows before it sees a token. depth: fixed, or None for the modelled best of each call.

    usual: the depth that stays unless the model finds another clearly faster. groups: of this rank, by stage.
    """

    topology: Topology
    groups: StageGroups
    depth: int | None = None
    usual: int = 1
    deduplicate: bool = True


@dataclass(frozen=True)
class Held:
    """Rows that a rank holds between two stages.

    slot_NK: computing slot of each copy, counted from the first slot of the rank's unit; -1 = elsewhere.
    weights_NK: None where they are the last columns of rows, or not sent at all.
    """

    rows: Array
    slot_NK: Array
    weights_NK: Array | None


@dataclass(frozen=True)
class Sent:
    """One stage as this rank ran it. row_M: the held row that each sent row came from."""

    group: Group
    row_M: Array
    held: int
    send: tuple[int, ...]
    receive: tuple[int, ...]


@dataclass(frozen=True)
class Trail:
    """What combine needs. sent: stages in order; weights_NK: those that rode along, of `origin`."""

    sent: tuple[Sent, ...]
    tokens: int
    weights_NK: Array | None
    origin: Array


def hierarchy_groups(comm: Communicator, mesh: Mesh, topology: Topology) -> dict[tuple[int, bool], Group]:
    """This rank's group of each stage of every depth. Collective: all ranks call it alike."""
    found: dict[tuple[int, bool], Group] = {}
    for number in range(1, topology.depth + 1):
        for last in (False, True):
            if not last and number == topology.depth:
                continue
            partition: list[list[int]] = []
            for members in mesh.partition("expert"):
                partition += [[members[r] for r in part] for part in _stage_partition(topology, number, last)]
            found[number, last] = comm.group(f"stage_{number}{'_last' if last else ''}", partition)
    return found


def _stage_partition(topology: Topology, number: int, last: bool) -> list[list[int]]:
    depth = number if last else number + 1
    before, after = topology.fan(number, depth)
    fan = after // before
    empty = np.zeros((topology.ranks, after), np.int64)
    stage = Stage(number, depth, fan, topology.ranks // after, empty)
    return sorted({tuple(stage.peers(r).tolist()) for r in range(topology.ranks)})  # type: ignore[return-value]


def stage_traffic(
    topology: Topology, stage: Stage, slots_per_rank: int, columns: int, row_bytes: tuple[int, int]
) -> Traffic:
    """Bytes of one stage. columns: slots that ride along with a row; row_bytes: without and with its weights."""
    plain, weighed = row_bytes
    id_bytes = 8 * words(columns, stage.part * slots_per_rank)
    name = topology.stage_name(stage.number, stage.depth)
    return Traffic(name, stage.rows * (weighed + id_bytes), stage.rows * plain)


class HierarchicalDedup:
    """HD-d: stages of uneven all-to-alls from the outermost level inwards, and back."""

    def __init__(self, ops: Ops, comm: Communicator, group: Group, hierarchy: Hierarchy) -> None:
        self._ops, self._comm, self._group, self._of = ops, comm, group, hierarchy

    def dispatch(self, x_TD: Array, routing: Routing, plan: Plan | None) -> tuple[Array, Exchange]:
        assert plan is not None
        ops, of, (tokens, top_k) = self._ops, self._of, routing.ids_TK.shape
        dest_TK = device_destinations(ops, routing.ids_TK, plan, self._group.index)
        hits = self._hits(dest_TK, plan)
        row_bytes, layout = self._row_bytes(x_TD, routing.weights_TK), plan.slots_per_rank
        depth = of.depth or choose_depth(of.topology, hits, row_bytes, of.usual)
        held = self._hold(x_TD, dest_TK, routing.weights_TK)
        sent: list[Sent] = []
        traffic: list[Traffic] = []
        for stage in stages(of.topology, depth, hits):
            part_slots = stage.part * layout
            copies = top_k if not (of.deduplicate or sent) else 1
            held, record = self._send(held, stage, part_slots, copies)
            sent.append(record)
            width = x_TD.shape[1] * BYTES[ops.dtype_of(x_TD)]
            traffic.append(stage_traffic(of.topology, stage, layout, held.slot_NK.shape[1], (width, row_bytes)))
        rows_ND, position, weights = self._to_slots(held, plan, x_TD.shape[1])
        trail = Trail(tuple(sent), tokens, weights, routing.weights_TK)
        counts = ops.asarray(plan.rows_per_slot(self._group.index))
        return rows_ND, Exchange(position, counts, traffic=tuple(traffic), extra=trail)

    def combine(self, rows_ND: Array, weights_TK: Array, exchange: Exchange) -> Array:
        ops, trail, position = self._ops, exchange.extra, exchange.position_TK
        if self._of.deduplicate:
            y = ops.combine_rows(rows_ND, position, self._weights(weights_TK, trail))
        else:
            y = ops.take_rows(rows_ND, position.reshape((-1,)))
        for stage in reversed(trail.sent):
            y = self._comm.all_to_all(y, stage.group, stage.receive, stage.send)
            y = ops.sum_rows(y, stage.row_M, stage.held)
        if self._of.deduplicate:
            return y
        every = ops.asarray(np.arange(y.shape[0])).reshape(weights_TK.shape)
        return ops.combine_rows(y, every, weights_TK)

    def _hits(self, dest_TK: Array, plan: Plan) -> list[np.ndarray]:
        """Rows per source and unit at every level: the second copy to the host of this transport.

        One all-gather of at most 3 x ranks integers. Without deduplication the plan knows them: no copy.
        """
        ops, units = self._ops, level_units(self._of.topology)
        if not self._of.deduplicate:
            matrix = plan.send_matrix()
            return [matrix.reshape(plan.ranks, u, -1).sum(2) for u in units]
        tokens, slots = dest_TK.shape[0], plan.slots.size
        token_T1 = ops.asarray(np.arange(tokens)).reshape((-1, 1))
        counts = []
        for u in units:
            unit = dest_TK // (slots // u)
            hit = ops.count(ops.where(dest_TK >= 0, unit * tokens + token_T1, -1), u * tokens) > 0
            unit_of_key = ops.asarray(np.repeat(np.arange(u), tokens))
            counts.append(ops.count(ops.where(hit, unit_of_key, -1), u))
        gathered = self._comm.gather_to_host(ops.concat(counts), self._group)
        return np.split(gathered, np.cumsum(units)[:-1].tolist(), axis=1)

    def _row_bytes(self, x_TD: Array, weights_TK: Array) -> int:
        ops = self._ops
        weights = weights_TK.shape[1] * BYTES[ops.dtype_of(weights_TK)] if self._of.deduplicate else 0
        return x_TD.shape[1] * BYTES[ops.dtype_of(x_TD)] + weights

    def _hold(self, x_TD: Array, dest_TK: Array, weights_TK: Array) -> Held:
        """Weights of the rows' own dtype become columns of the rows: one collective fewer per stage."""
        if not self._of.deduplicate:
            return Held(x_TD, dest_TK.reshape((-1, 1)), None)
        if self._ops.dtype_of(x_TD) == self._ops.dtype_of(weights_TK):
            return Held(self._ops.concat([x_TD, weights_TK], 1), dest_TK, None)
        return Held(x_TD, dest_TK, weights_TK)

    def _send(self, held: Held, stage: Stage, part_slots: int, copies: int) -> tuple[Held, Sent]:
        """One copy of each held row to every part of the unit that it hits."""
        ops, me = self._ops, self._group.index
        group = self._of.groups[stage.number, stage.number == stage.depth]
        peers = stage.peers(me)
        send, receive = stage.rows[me, peers].tolist(), stage.rows[peers, me].tolist()
        num = held.slot_NK.shape[0]
        row_M, part_M = self._selection(held.slot_NK, stage.fan, part_slots, sum(send))
        slot = ops.take_rows(held.slot_NK, row_M) - part_M.reshape((-1, 1)) * part_slots
        slot = ops.where((slot >= 0) & (slot < part_slots), slot, -1)
        packed = self._comm.all_to_all(pack(ops, slot, part_slots), group, send, receive)
        arrived = Held(
            self._comm.all_to_all(ops.take_rows(held.rows, row_M // copies), group, send, receive),
            unpack(ops, packed, held.slot_NK.shape[1], part_slots),
            None if held.weights_NK is None else self._carry(held.weights_NK, row_M, group, send, receive),
        )
        return arrived, Sent(group, row_M, num, tuple(send), tuple(receive))

    def _selection(self, slot_NK: Array, fan: int, part_slots: int, sent: int) -> tuple[Array, Array]:
        """(held row, part) of each row to send, by part, then row."""
        ops, num = self._ops, slot_NK.shape[0]
        row_N1 = ops.asarray(np.arange(num)).reshape((-1, 1))
        times = ops.count(ops.where(slot_NK >= 0, slot_NK // part_slots * num + row_N1, -1), fan * num)
        order = ops.argsort(ops.where(times > 0, 0, times + 1))
        chosen = ops.split(order, [sent, fan * num - sent])[0]
        return chosen % max(1, num), chosen // max(1, num)

    def _carry(
        self, weights_NK: Array, row_M: Array, group: Group, send: Sequence[int], receive: Sequence[int]
    ) -> Array:
        return self._comm.all_to_all(self._ops.take_rows(weights_NK, row_M), group, send, receive)

    def _to_slots(self, held: Held, plan: Plan, width: int) -> tuple[Array, Array, Array | None]:
        """(rows in slot order, row of each copy of a held row or -1, weights of the held rows)."""
        ops, me = self._ops, self._group.index
        rows, weights = held.rows, held.weights_NK
        if self._of.deduplicate and weights is None:
            rows, weights = ops.split(rows, [width, rows.shape[1] - width], 1)
        shape = held.slot_NK.shape
        order = ops.argsort(ops.where(held.slot_NK >= 0, held.slot_NK, plan.slots_per_rank).reshape((-1,)))
        computed = int(plan.rows_per_rank()[me])
        kept = ops.split(order, [computed, order.shape[0] - computed])[0]
        position = ops.where(held.slot_NK >= 0, ops.invert(order).reshape(shape), -1)
        return ops.take_rows(rows, kept // shape[1]), position, weights

    def _weights(self, weights_TK: Array, trail: Trail) -> Array:
        """Those that rode along, or others sent after them."""
        if weights_TK is trail.origin:
            return trail.weights_NK
        for stage in trail.sent:
            weights_TK = self._carry(weights_TK, stage.row_M, stage.group, stage.send, stage.receive)
        return weights_TK
