"""Weights rest with their owner and are lent for one call to the ranks that help (LLEP).

Forward sends one flat buffer per lent expert; its adjoint brings the weight gradient back, where the owner adds it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...backends.protocol import Array, Communicator, Group, Ops, Parameter
from ..config import MoeConfig
from ..plan import RESIDENT, Plan
from ..transport.base import Exchange
from .feed_forward import expert_rows
from .owned import Owned, expert_names, expert_shapes


class Borrowed:
    """`Owned` parameters; slots past the owned ones hold experts of other ranks. Native rows are computed first."""

    def __init__(self, owned: Owned, ops: Ops, comm: Communicator, group: Group, moe: MoeConfig, width: int) -> None:
        self._owned, self._ops, self._comm, self._group, self._moe = owned, ops, comm, group, moe
        self._names = expert_names(moe)
        self._shapes = [shape for _, shape, _ in expert_shapes(moe, width, 0.0, 0.0)]

    def parameters(self, prefix: str, std_down: float) -> tuple[Parameter, ...]:
        return self._owned.parameters(prefix, std_down)

    def compute(self, params: Mapping[str, Array], rows_ND: Array, exchange: Exchange, plan: Plan | None) -> Array:
        if plan is None or not lends(plan):
            return self._owned.compute(params, rows_ND, exchange, plan)
        ops, moe, me = self._ops, self._moe, self._group.index
        rows_C, native = plan.rows_per_slot(me), params["w_up"].shape[0]
        first_borrowed = native_slots(plan, me)
        held = int((plan.weight_from[me] >= 0).sum())
        own_rows = int(rows_C[:first_borrowed].sum())
        own_ND, other_ND = ops.split(rows_ND, [own_rows, rows_ND.shape[0] - own_rows])
        borrowed = self._borrow(params, plan)
        own = expert_rows(ops, moe, own_ND, [params[name] for name in self._names], ops.asarray(rows_C[:native]))
        lent = ops.asarray(rows_C[first_borrowed : first_borrowed + held])
        return ops.concat([own, expert_rows(ops, moe, other_ND, borrowed, lent)])

    def _borrow(self, params: Mapping[str, Array], plan: Plan) -> list[Array]:
        """The stacks of the borrowed experts of this rank, in slot order: one all-to-all of flat experts."""
        ops, me = self._ops, self._group.index
        sends, receives, index, slot_order = loans(plan, me)
        chosen = ops.asarray(index)
        sizes = [int(np.prod(shape)) for shape in self._shapes]
        stacks = [params[name].reshape((-1, size)) for name, size in zip(self._names, sizes)]
        flat = ops.concat([ops.take_rows(stack, chosen) for stack in stacks], 1)
        arrived = self._comm.all_to_all(flat, self._group, sends, receives)
        arrived = arrived if slot_order is None else ops.take_rows(arrived, ops.asarray(slot_order))
        return [
            part.reshape((arrived.shape[0], *shape)) for part, shape in zip(ops.split(arrived, sizes, 1), self._shapes)
        ]


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
