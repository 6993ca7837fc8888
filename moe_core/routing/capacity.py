"""How many tokens an expert takes, and which: exact rationals, one rule, the same on every rank and backend."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from ...backends.protocol import Array, Ops
from .base import RouterContext, State, Tokens, constant, times
from .theory import capacity_bound

Factor = float | str | Fraction | int

NO_DELTA = -1.0
"""Value of the state `delta` before the first batch has been seen."""


def expert_capacity(factor: Factor, tokens: int, top_k: int, num_experts: int, minimum: int = 1) -> int:
    """max(minimum, ceil(factor x tokens x top_k / num_experts)), in exact rationals (a float counts as printed)."""
    exact = Fraction(str(factor)) * tokens * top_k / num_experts
    return max(minimum, math.ceil(exact))


def group_capacity(context: RouterContext, tokens: Tokens, num_tokens: int, state: State) -> int | None:
    """Capacity of an expert in each group that competes: a sequence, or (capacity_group: rank) a rank's tokens.

    rank: the largest rank counts, so that all agree. angle rules: max(1, ceil(1/(n p_delta))) between min_capacity
    and the factor's capacity (1.1 if null), which holds until a first batch gave delta. None: dropless.
    """
    moe = context.moe
    if moe.capacity_factor is None and moe.capacity_rule == "factor":
        return None
    length = num_tokens // max(tokens.sequences, 1) if moe.capacity_group == "sequence" else context.largest(num_tokens)
    factor = "1.1" if moe.capacity_factor is None else moe.capacity_factor
    most = expert_capacity(factor, length, moe.top_k, moe.num_experts, moe.min_capacity)
    delta = float(state["delta"][0]) if moe.capacity_rule != "factor" else NO_DELTA
    if delta == NO_DELTA:
        return most
    bound = capacity_bound(delta, context.width, moe.num_experts)
    return most if bound > most else min(most, max(moe.min_capacity, math.ceil(bound)))


def within_capacity(
    ops: Ops, ids_TK: Array, scores_TK: Array | None, groups: int, num_experts: int, capacity: int
) -> Array:
    """Boolean (T, K): the copies that an expert keeps, `capacity` per group of T/groups tokens.

    First come (scores None), or the highest score first, then the earlier token. Integers only: each class
    (group, expert) gets a sentinel that a stable sort puts before its copies, and a copy's rank is its distance to it.
    """
    num_tokens, top_k = ids_TK.shape
    length = num_tokens // max(groups, 1)
    if capacity >= length:
        return ids_TK >= 0
    classes = groups * (num_experts + 1)
    group_T1 = ops.asarray(np.arange(num_tokens).reshape(-1, 1) // length)
    keys_N = (group_T1 * (num_experts + 1) + ops.where(ids_TK >= 0, ids_TK, num_experts)).reshape((-1,))
    first_N = None
    if scores_TK is not None:
        ranked = ops.where(ids_TK >= 0, scores_TK, -math.inf).reshape((groups, length * top_k))
        offset_G1 = ops.asarray(np.arange(groups).reshape(-1, 1) * length * top_k)
        first_N = (ops.topk(ranked, length * top_k) + offset_G1).reshape((-1,))
        keys_N = ops.take_rows(keys_N, first_N)
    sentinels = ops.asarray(np.arange(classes))
    places = ops.invert(ops.argsort(ops.concat([sentinels, keys_N])))
    start_C, place_N = ops.split(places, [classes, num_tokens * top_k])
    rank_N = place_N - ops.take_rows(start_C, keys_N) - 1
    if first_N is not None:
        rank_N = ops.take_rows(rank_N, ops.invert(first_N))
    return (rank_N.reshape(ids_TK.shape) < capacity) & (ids_TK >= 0)


def within_mass(ops: Ops, ids_TK: Array, scores_TK: Array, groups: int, num_experts: int, mass: float) -> Array:
    """Boolean (T, K): the best copies of each (group, expert) until they hold `mass` of its summed scores (ETR).

    Scores below zero count as zero and are not kept.
    """
    num_tokens, top_k = ids_TK.shape
    length = num_tokens // max(groups, 1)
    if length == 0:
        return ids_TK >= 0
    picked = ids_TK.reshape((num_tokens, top_k, 1)) == ops.asarray(np.arange(num_experts).reshape(1, 1, -1))
    dense_TE = ops.where(picked, ops.relu(scores_TK).reshape((num_tokens, top_k, 1)), 0.0).sum(1)
    rows = groups * num_experts
    dense_CL = ops.transpose(dense_TE.reshape((groups, length, num_experts)), (0, 2, 1)).reshape((rows, length))
    order_CL = ops.topk(dense_CL, length)
    sorted_CL = ops.take_along(dense_CL, order_CL)
    before = constant(ops, np.triu(np.ones((length, length)), 1), ops.dtype_of(sorted_CL))
    enough_C1 = times(ops, sorted_CL.sum(-1).reshape((-1, 1)), mass)
    kept_CL = ((sorted_CL @ before) < enough_C1) & (sorted_CL > 0)
    row_C1 = ops.asarray(np.arange(rows).reshape(-1, 1) * length)
    flags = ops.count(ops.where(kept_CL, row_C1 + order_CL, -1), rows * length)
    flags_TE = ops.transpose(flags.reshape((groups, num_experts, length)), (0, 2, 1)).reshape((num_tokens, num_experts))
    flags_TE = ops.cast(flags_TE, ops.dtype_of(sorted_CL))
    return (ops.take_along(flags_TE, ops.where(ids_TK >= 0, ids_TK, 0)) > 0) & (ids_TK >= 0)
