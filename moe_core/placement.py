"""Which rank owns which expert, and the exchange of two experts between optimizer steps.

Routers keep logical ids and are never touched: only the table of owned experts changes, and with it the rows of the
stacks in which weights and optimizer state rest. Rows are overwritten in place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol

import numpy as np

from ..backends.protocol import Array, Communicator, DType, Group, Ops, Parameter, State, Trainer
from .plan import Plan
from .planners.swap import Demand, LevelCounts
from .residency.owned import expert_name
from .transport.hierarchical import BYTES


class Owners(Protocol):
    """A planner that reads the table of owned experts at every call."""

    owned_RC: np.ndarray


@dataclass
class Placed:
    """A planner without memory whose owners may change between steps."""

    function: Callable[[np.ndarray, np.ndarray], Plan]
    owned_RC: np.ndarray

    def plan(self, counts_RE: np.ndarray, training: bool) -> Plan:
        return self.function(counts_RE, self.owned_RC)

    def coming(self) -> None:
        """Nothing: which experts are lent depends on the counts."""

    def state(self) -> dict[str, np.ndarray]:
        """Nothing: checkpoints keep the table beside the tensors that it describes."""
        return {}

    def load(self, state: dict[str, np.ndarray]) -> None:
        return

    def figures(self) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class PlacedLayer:
    """A layer whose experts may move: name prefix of its parameters, its planner, names of its stacks."""

    prefix: str
    planner: Owners
    stacks: tuple[str, ...]


@dataclass(frozen=True)
class Move:
    """This rank's expert in `row` of the stacks goes to group index `peer`, whose expert takes its place."""

    stacks: tuple[str, ...]
    row: int
    peer: int


def rank_of_expert(owned_RC: np.ndarray) -> np.ndarray:
    """(E,) owner of each expert."""
    rank, column = np.nonzero(owned_RC >= 0)
    owner_E = np.empty(len(rank), np.int64)
    owner_E[owned_RC[rank, column]] = rank
    return owner_E


def exchanged(owned_RC: np.ndarray, first: int, second: int) -> np.ndarray:
    """The table after two experts took each other's place."""
    after = owned_RC.copy()
    after[owned_RC == first], after[owned_RC == second] = second, first
    return after


def move_of(layer: PlacedLayer, first: int, second: int, rank: int) -> Move | None:
    """What this rank does when the experts exchange places; None if it owns neither or both."""
    table = layer.planner.owned_RC
    places = [tuple(np.argwhere(table == e)[0].tolist()) for e in (first, second)]
    (rank_a, row_a), (rank_b, row_b) = places
    if rank_a == rank_b or rank not in (rank_a, rank_b):
        return None
    return Move(layer.stacks, row_a, rank_b) if rank == rank_a else Move(layer.stacks, row_b, rank_a)


def exchange_rows(
    ops: Ops, trainer: Trainer, state: State, comm: Communicator, group: Group, moves: Sequence[Move]
) -> int:
    """Swap rows of stacks (weights and all optimizer state) with peers; returns the bytes that this rank sent.

    Collective over the group; one batch of point-to-point messages, one per peer and dtype. A stack may appear in
    one move only. Only the rows concerned are copied, on the device.
    """
    places = [(name, move.row) for move in moves for name in move.stacks]
    peers = [move.peer for move in moves for _ in move.stacks]
    leaving = trainer.state_rows(state, places)
    parcels: dict[tuple[int, DType], list[tuple[int, int]]] = defaultdict(list)
    for i, rows in enumerate(leaving):
        for j, row in enumerate(rows):
            parcels[peers[i], ops.dtype_of(row)].append((i, j))
    keys = sorted(parcels)
    sends = [(key[0], ops.concat([leaving[i][j].reshape((-1,)) for i, j in parcels[key]])) for key in keys]
    arrived = comm.exchange(sends, sends, group)
    arriving = [list(rows) for rows in leaving]
    for key, message in zip(keys, arrived, strict=True):
        sizes = [prod(leaving[i][j].shape) for i, j in parcels[key]]
        for (i, j), part in zip(parcels[key], ops.split(message, sizes), strict=True):
            arriving[i][j] = part.reshape(leaving[i][j].shape)
    if places:
        trainer.write_state_rows(state, places, arriving)
    return sum(BYTES[key[1]] * prod(leaving[i][j].shape) for key in keys for i, j in parcels[key])


def placed_parameters(
    parameters: Mapping[str, Parameter], layers: Sequence[PlacedLayer], rank: int
) -> dict[str, Parameter]:
    """The parameters of a rank with `pieces` that name the experts which are in each row now."""
    found = dict(parameters)
    for layer in layers:
        experts = [int(e) for e in layer.planner.owned_RC[rank] if e >= 0]
        for name in layer.stacks:
            pieces = found[name].pieces
            short = name[len(layer.prefix) :]
            names = [expert_name(layer.prefix, e, short) for e in experts]
            found[name] = replace(found[name], pieces=tuple(replace(p, name=n) for p, n in zip(pieces, names)))
    return found


def count_demand(ops: Ops, ids_TK: Array, rank_E: np.ndarray, units: Sequence[int]) -> Array:
    """Counts of one layer's own tokens (`planners.swap.demand_of`) on the device, as one flat vector of floats.

    Sums over micro-batches and ranks are exact below 2^24. units: number of units of each level.
    """
    num, tokens, ranks = len(rank_E), ids_TK.shape[0], int(rank_E.max()) + 1
    token_T1 = ops.asarray(np.arange(tokens)).reshape((-1, 1))
    times = ops.count(ops.where(ids_TK >= 0, token_T1 * num + ids_TK, -1), tokens * num)
    chosen_TE = ops.cast((times > 0).reshape((tokens, num)), "float32")
    chosen_ET = ops.transpose(chosen_TE, (1, 0))
    parts = [chosen_TE.sum(0)]
    for u in units:
        inside = (rank_E * u // ranks)[:, None] == np.arange(u)
        inside_EU = ops.cast(ops.asarray(inside), "float32")
        hits_TU = chosen_TE @ inside_EU
        sole_TE = chosen_TE * ops.cast((hits_TU @ ops.transpose(inside_EU, (1, 0))) == 1, "float32")
        parts.append(ops.cast(hits_TU > 0, "float32").sum(0))
        parts.append((chosen_ET @ ops.cast(hits_TU == 0, "float32")).reshape((num * u,)))
        parts.append((ops.transpose(sole_TE, (1, 0)) @ (1.0 - chosen_TE)).reshape((num * num,)))
    return ops.concat(parts)


def demand_from(flat: np.ndarray, rank_E: np.ndarray, units: Sequence[int]) -> Demand:
    """The summed vector of `count_demand` as counts."""
    num, ranks = len(rank_E), int(rank_E.max()) + 1
    whole = np.rint(flat).astype(np.int64)
    load_E, rest = whole[:num], whole[num:]
    levels = []
    for u in units:
        hit, miss, sole, rest = np.split(rest, np.cumsum([u, num * u, num * num]).tolist())
        levels.append(LevelCounts(rank_E * u // ranks, hit, miss.reshape(num, u), sole.reshape(num, num)))
    return Demand(load_E, rank_E, tuple(levels))


def placed_layers(layers: Mapping[int, Any], parameters: Mapping[str, Parameter]) -> list[PlacedLayer]:
    """The layers of a model whose planner has a table of owned experts, with their stacks. In layer order."""
    found = []
    for index in sorted(layers):
        planner, prefix = getattr(layers[index], "planner", None), f"layers.{index}.moe."
        if getattr(planner, "owned_RC", None) is None:
            continue
        stacks = tuple(sorted(n for n, p in parameters.items() if n.startswith(prefix) and p.pieces))
        found.append(PlacedLayer(prefix, planner, stacks))  # type: ignore[arg-type]
    return found


def restore_placements(layers: Sequence[PlacedLayer], tables: Sequence[Sequence[Sequence[int]]]) -> None:
    """Take up tables of owned experts that another run saved, where it had the same ranks; else experts stay.

    ValueError for a table in which an expert is missing or comes twice.
    """
    for layer, table in zip(layers, tables):
        saved = np.asarray(table, np.int64)
        if saved.shape == layer.planner.owned_RC.shape:
            if not np.array_equal(np.sort(saved, None), np.sort(layer.planner.owned_RC, None)):
                raise ValueError("a placement in which not every expert has one place")
            layer.planner.owned_RC = saved
