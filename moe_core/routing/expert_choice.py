"""Experts choose tokens (Zhou et al. 2022): perfect balance, a varying number of experts per token."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ...backends.protocol import Array, Ops, Parameter
from .base import Choice, Memo, RouterContext, Tokens, times
from .capacity import expert_capacity
from .finite import screen
from .gate import jittered
from .topk import router_logits, router_weight


class ExpertChoice:
    """In each sequence an expert takes its C best tokens, C = ceil(factor L top_k / E), factor 1 if null.

    Weights are the tokens' softmax probabilities. There are as many columns as experts, -1 where one did not choose.
    A token's choice depends on later tokens of its sequence: fine for encoders and training studies, not causal.
    """

    def __init__(self, context: RouterContext) -> None:
        self._context = context

    def parameters(self, prefix: str) -> tuple[Parameter, ...]:
        return (router_weight(self._context, prefix),)

    def choose(self, params: Mapping[str, Array], x_TD: Array, tokens: Tokens, memo: Memo) -> Choice:
        context, ops, moe = self._context, self._context.ops, self._context.moe
        raw_TE = router_logits(ops, x_TD, params["w_router"], moe.router_dtype)
        screened = screen(ops, moe.nan_policy, jittered(context, raw_TE, tokens, memo))
        shares_TE = ops.softmax(screened.logits_TE)
        ids_TE = memo.once("chosen", lambda: self._ids(shares_TE, screened.unusable_T, tokens))
        weights_TE = shares_TE if moe.route_scale == 1.0 else times(ops, shares_TE, moe.route_scale)
        return Choice(
            ids_TE,
            weights_TE,
            shares_TE=shares_TE,
            logits_TE=screened.logits_TE,
            kept_TK=ids_TE,
            nan_T=screened.nan_T,
            unusable_T=screened.unusable_T,
        )

    def _ids(self, shares_TE: Array, unusable_T: Array | None, tokens: Tokens) -> Array:
        """(T, E): e where expert e takes the token, else -1."""
        ops, moe = self._context.ops, self._context.moe
        num_tokens, num_experts = shares_TE.shape
        groups = max(tokens.sequences, 1) if moe.capacity_group == "sequence" else 1
        length = num_tokens // groups
        factor = 1 if moe.capacity_factor is None else moe.capacity_factor
        capacity = min(length, expert_capacity(factor, length, moe.top_k, num_experts, moe.min_capacity))
        ratings = ops.stop_gradient(shares_TE)
        for flag_T in (tokens.real_T, None if unusable_T is None else ~unusable_T):
            if flag_T is not None:
                ratings = ops.where(flag_T.reshape((-1, 1)), ratings, -math.inf)
        taken_TE = best_tokens(ops, ratings, groups, capacity)
        experts_1E = ops.asarray(np.arange(num_experts).reshape(1, -1))
        return ops.where(taken_TE & (ratings >= 0), experts_1E, -1)


def best_tokens(ops: Ops, ratings_TE: Array, groups: int, capacity: int) -> Array:
    """Boolean (T, E): whether the token is among its group's `capacity` best for the expert; ties to the earlier."""
    num_tokens, num_experts = ratings_TE.shape
    length, rows = num_tokens // groups, groups * num_experts
    if length == 0 or capacity == 0:
        return ratings_TE < -math.inf
    by_expert = ops.transpose(ratings_TE.reshape((groups, length, num_experts)), (0, 2, 1)).reshape((rows, length))
    picked = ops.topk(by_expert, capacity) + ops.asarray(np.arange(rows).reshape(-1, 1) * length)
    flags = ops.count(picked, rows * length).reshape((groups, num_experts, length))
    return ops.transpose(flags, (0, 2, 1)).reshape((num_tokens, num_experts)) > 0
