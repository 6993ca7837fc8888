"""A layer's rows in rounds, on the same slots with the same weights: to bound memory, or to overlap exchanges.

Every rank runs the same number of rounds. A round is the plan's rows in slots of that round (`budget.round_plan`); a
token's output is the sum over rounds, so the function is that of the whole plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backends.protocol import Array
from .plan import Plan
from .planners.budget import round_plan
from .prefetch import taken
from .routing.base import Memo, Routing
from .transport.base import Exchange, Overlapping, Traffic
from .transport.flat import device_destinations

if TYPE_CHECKING:
    from .layer import MoELayer


@dataclass(frozen=True)
class Round:
    """What of a step's copies one round carries: ids of others are -1."""

    routing: Routing
    plan: Plan


def in_rounds(
    layer: MoELayer, own: tuple[Mapping[str, Array], Memo], x_TD: Array, routing: Routing, plan: Plan
) -> tuple[Array, Exchange]:
    """(y_TD, what statistics need of the exchanges). Weights are gathered once and kept for all rounds.

    own: parameters and memo of this call. Nothing is fetched ahead for the next layer.
    """
    rounds = _rounds(layer, routing, plan)
    weights = taken(layer, own[0], rounds[0].plan, own[1])
    if layer.rounds.exceeded(plan):
        return _bounded(layer, layer.residency.arrived(weights), x_TD, rounds)
    return _overlapped(layer, weights, x_TD, rounds)


def _rounds(layer: MoELayer, routing: Routing, plan: Plan) -> list[Round]:
    ops, ids = layer.ops, routing.ids_TK
    dest_TK = device_destinations(ops, ids, plan, layer.group.index)
    slot = ops.where(dest_TK >= 0, dest_TK, plan.slots.size).reshape((-1,))
    round_TK = ops.take_rows(ops.asarray(np.append(plan.round, -1)), slot).reshape(ids.shape)
    return [
        Round(replace(routing, ids_TK=ops.where(round_TK == n, ids, -1)), round_plan(plan, n))
        for n in range(plan.rounds)
    ]


def _bounded(layer: MoELayer, weights: Any, x_TD: Array, rounds: Sequence[Round]) -> tuple[Array, Exchange]:
    """One after the other. Backward computes each round again: a rank never holds rows of two."""
    seen: dict[int, Exchange] = {}
    y_TD = None
    for number, part in enumerate(rounds):

        def carry(x_TD: Array, number: int = number, part: Round = part) -> Array:
            rows_ND, exchange = layer.transport.dispatch(x_TD, part.routing, part.plan)
            out_ND = layer.residency.compute(weights, rows_ND, exchange, part.plan)
            seen[number] = replace(exchange, extra=None)
            return layer.transport.combine(out_ND, part.routing.weights_TK, exchange)

        part_TD = layer.ops.checkpoint(carry, x_TD)
        y_TD = part_TD if y_TD is None else y_TD + part_TD
    return y_TD, _merged([seen[number] for number in range(len(rounds))])


def _overlapped(layer: MoELayer, weights: Any, x_TD: Array, rounds: Sequence[Round]) -> tuple[Array, Exchange]:
    """Rows of the next round, and results of the one before, travel while a round is computed."""
    transport = layer.transport
    assert isinstance(transport, Overlapping)
    coming = transport.dispatch_start(x_TD, rounds[0].routing, rounds[0].plan)
    leaving: list[tuple[Any, Exchange]] = []
    weights = layer.residency.arrived(weights)
    for number, part in enumerate(rounds):
        after = rounds[number + 1] if number + 1 < len(rounds) else None
        next_coming = None if after is None else transport.dispatch_start(x_TD, after.routing, after.plan)
        rows_ND, exchange = transport.dispatch_finish(coming)
        out_ND = _experts(layer, weights, rows_ND, exchange, part.plan)
        leaving.append((transport.combine_start(out_ND, exchange), exchange))
        coming = next_coming
    y_TD = None
    for part, (started, exchange) in zip(rounds, leaving, strict=True):
        part_TD = transport.combine_finish(started, part.routing.weights_TK, exchange)
        y_TD = part_TD if y_TD is None else y_TD + part_TD
    return y_TD, _merged([exchange for _, exchange in leaving])


def _experts(layer: MoELayer, weights: Any, rows_ND: Array, exchange: Exchange, plan: Plan) -> Array:
    if not layer.checkpoint_experts:
        return layer.residency.compute(weights, rows_ND, exchange, plan)
    return layer.ops.checkpoint(lambda rows: layer.residency.compute(weights, rows, exchange, plan), rows_ND)


def _merged(exchanges: Sequence[Exchange]) -> Exchange:
    """The last exchange with the traffic of all: stage by stage, added up."""
    total: dict[tuple[int, str], Traffic] = {}
    for exchange in exchanges:
        for number, traffic in enumerate(exchange.traffic):
            before = total.get((number, traffic.level))
            total[number, traffic.level] = traffic if before is None else _added(before, traffic)
    inside = [exchange.tensor_bytes for exchange in exchanges if exchange.tensor_bytes is not None]
    tensor_bytes = (sum(out for out, _ in inside), sum(back for _, back in inside)) if inside else None
    return replace(exchanges[-1], traffic=tuple(total.values()), tensor_bytes=tensor_bytes, extra=None)


def _added(a: Traffic, b: Traffic) -> Traffic:
    rows = None if a.rows is None or b.rows is None else a.rows + b.rows
    return Traffic(a.level, a.sent + b.sent, rows)
