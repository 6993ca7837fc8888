"""Weights rest with their owner and are lent for one call to the ranks that help (LLEP).

Forward sends one flat buffer per lent expert; its adjoint brings the weight gradient back, where the owner adds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...backends.protocol import Array, Communicator, Group, Ops, Parameter
from ..config import MoeConfig
from ..plan import RESIDENT, Plan
from ..transport.base import Exchange
from .feed_forward import expert_rows
from .owned import Owned, expert_names, expert_shapes


@dataclass(frozen=True)
class Loans:
    """own: this rank's parameters. started: borrowed experts under way, None where nobody lends; slot_order: where
    they go once here (None: as they come). stacks: the experts, here."""

    own: Mapping[str, Array]
    started: Any = None
    slot_order: np.ndarray | None = None
    stacks: list[Array] | None = None


class Borrowed:
    """`Owned` parameters; slots past the owned ones hold experts of other ranks.

    Native rows are computed while borrowed weights may still be on their way; where rows are more than weights, which
    then come long before them, both go through one product: joining stacks copies less than joining outputs.
    """

    def __init__(self, owned: Owned, ops: Ops, comm: Communicator, group: Group, moe: MoeConfig, width: int) -> None:
        self._owned, self._ops, self._comm, self._group, self._moe = owned, ops, comm, group, moe
        self._names = expert_names(moe)
        self._shapes = [shape for _, shape, _ in expert_shapes(moe, width, 0.0, 0.0)]
        self._sizes = [int(np.prod(shape)) for shape in self._shapes]

    def parameters(self, prefix: str, std_down: float) -> tuple[Parameter, ...]:
        return self._owned.parameters(prefix, std_down)

    def gather(self, params: Mapping[str, Array], plan: Plan | None) -> Loans:
        """One all-to-all of flat experts, under way."""
        if plan is None or not lends(plan):
            return Loans(params)
        ops = self._ops
        sends, receives, index, slot_order = loans(plan, self._group.index)
        chosen = ops.asarray(index)
        stacks = [params[name].reshape((-1, size)) for name, size in zip(self._names, self._sizes)]
        flat = ops.concat([ops.take_rows(stack, chosen) for stack in stacks], 1)
        return Loans(params, self._comm.all_to_all_start(flat, self._group, sends, receives), slot_order)

    def arrived(self, weights: Loans) -> Loans:
        """With the stacks of the borrowed experts of this rank, in slot order."""
        if weights.started is None or weights.stacks is not None:
            return weights
        flat = self._comm.all_to_all_finish(weights.started)
        flat = flat if weights.slot_order is None else self._ops.take_rows(flat, self._ops.asarray(weights.slot_order))
        parts = self._ops.split(flat, self._sizes, 1)
        stacks = [part.reshape((flat.shape[0], *shape)) for part, shape in zip(parts, self._shapes)]
        return replace(weights, stacks=stacks)

    def compute(self, weights: Loans, rows_ND: Array, exchange: Exchange, plan: Plan | None) -> Array:
        if plan is None or weights.started is None:
            return self._owned.compute(weights.own, rows_ND, exchange, plan)
        ops, moe, me = self._ops, self._moe, self._group.index
        rows_C, native = plan.rows_per_slot(me), weights.own["w_up"].shape[0]
        first_borrowed = native_slots(plan, me)
        held = int((plan.weight_from[me] >= 0).sum())
        own_C, lent_C = rows_C[:native], rows_C[first_borrowed : first_borrowed + held]
        own_stacks = [weights.own[name] for name in self._names]
        if rows_ND.shape[0] * rows_ND.shape[1] > (native + held) * sum(self._sizes):
            stacks = [ops.concat([own, lent]) for own, lent in zip(own_stacks, self._here(weights), strict=True)]
            return expert_rows(ops, moe, rows_ND, stacks, ops.asarray(np.concatenate([own_C, lent_C])))
        own_rows = int(own_C.sum())
        own_ND, lent_ND = ops.split(rows_ND, [own_rows, rows_ND.shape[0] - own_rows])
        own_ND = expert_rows(ops, moe, own_ND, own_stacks, ops.asarray(own_C))
        return ops.concat([own_ND, expert_rows(ops, moe, lent_ND, self._here(weights), ops.asarray(lent_C))])

    def _here(self, weights: Loans) -> list[Array]:
        stacks = self.arrived(weights).stacks
        assert stacks is not None
        return stacks


def lends(plan: Plan) -> bool:
    """Whether any rank borrows in this plan: the same answer on every rank."""
    return bool((plan.weight_from >= 0).any())


def native_slots(plan: Plan, rank: int) -> int:
    """Number of leading slots of a rank that are not borrowed."""
    borrowed = np.flatnonzero(plan.weight_from[rank] >= 0)
    return int(borrowed[0]) if len(borrowed) else plan.slots_per_rank


def loans(plan: Plan, me: int) -> tuple[list[int], list[int], np.ndarray, np.ndarray | None]:
    """(experts sent to each rank, received from each rank, rows of this rank's stack in sending order, order of slots).

    Experts arrive by owner and, from one owner, in the order of slots; the last item puts them into slot order (None
    where they are).
    """
    mine = plan.slots[me][(plan.slots[me] >= 0) & (plan.weight_from[me] == RESIDENT)]
    row_of = {int(e): i for i, e in enumerate(mine)}
    wanted = [plan.slots[r][plan.weight_from[r] == me] for r in range(plan.ranks)]
    index = np.array([row_of[int(e)] for experts in wanted for e in experts], np.int64)
    owners = plan.weight_from[me][plan.weight_from[me] >= 0]
    arrival = np.argsort(owners, kind="stable")
    in_order = bool((arrival == np.arange(len(arrival))).all())
    receives = np.bincount(owners, minlength=plan.ranks).tolist()
    return [len(w) for w in wanted], receives, index, None if in_order else np.argsort(arrival)
