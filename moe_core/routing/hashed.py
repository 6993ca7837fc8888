"""Routing by what a token is, not by its vector: hash of the id, and PanGu-Sigma's domain level above it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ...backends.protocol import Array, Parameter
from .base import Choice, Memo, RouterContext, Tokens, times, wide_dtype
from .gate import gate
from .grap import block_means, check_blocks, scaled
from .keyed import balanced_table
from .topk import router_logits, router_weight


class HashRouter:
    """Token id -> top_k experts by a balanced random table, another for every layer; equal weights, no gradient."""

    def __init__(self, context: RouterContext) -> None:
        moe = context.moe
        self._context = context
        key = (context.seed, "hash", context.layer)
        self._table_VK = context.ops.asarray(balanced_table(vocabulary(context), moe.num_experts, moe.top_k, *key))

    def parameters(self, prefix: str) -> tuple[Parameter, ...]:
        del prefix
        return ()

    def choose(self, params: Mapping[str, Array], x_TD: Array, tokens: Tokens, memo: Memo) -> Choice:
        ids_T = token_ids(tokens)
        return looked_up(self._context, self._table_VK, ids_T, x_TD, memo)


class Hierarchical:
    """PanGu-Sigma: the domain of a sequence picks one of `num_groups` groups of experts, an inner router one inside.

    inner_router random: balanced random tables, one per group and layer (RRE); topk: a learned gate over the group;
    grap: grouped average pooling over as many blocks as a group has experts (LocMoE inside PanGu-Sigma).
    """

    def __init__(self, context: RouterContext) -> None:
        moe = context.moe
        self._context, self._groups = context, moe.num_groups
        self._size = moe.num_experts // moe.num_groups
        if moe.num_experts % moe.num_groups or moe.top_k > self._size:
            raise ValueError(
                f"hierarchical routing needs moe.num_groups={moe.num_groups} equal groups of at least "
                f"moe.top_k={moe.top_k} of the {moe.num_experts} experts; change one of the three"
            )
        if moe.inner_router == "grap":
            check_blocks(context.width, self._size, "moe.num_experts / moe.num_groups")
        if moe.inner_router == "random":
            self._table_VK = context.ops.asarray(self._tables())
        # the group is chosen by the domain: the gate must not choose again
        self._inner = replace(context, moe=moe.model_copy(update={"num_groups": 1}))

    def parameters(self, prefix: str) -> tuple[Parameter, ...]:
        return (router_weight(self._context, prefix),) if self._context.moe.inner_router == "topk" else ()

    def choose(self, params: Mapping[str, Array], x_TD: Array, tokens: Tokens, memo: Memo) -> Choice:
        ops, inner = self._context.ops, self._context.moe.inner_router
        group_S = self._group_of_sequence(tokens)
        length = x_TD.shape[0] // max(tokens.sequences, 1)
        group_T1 = ops.asarray(np.repeat(group_S, length).reshape(-1, 1))
        if inner == "random":
            rows_T = group_T1.reshape((-1,)) * vocabulary(self._context) + token_ids(tokens)
            return looked_up(self._context, self._table_VK, rows_T, x_TD, memo)
        experts = ops.asarray(np.arange(self._context.moe.num_experts).reshape(1, -1) // self._size)
        logits_TE = self._logits(params, x_TD)
        return gate(self._inner, logits_TE, tokens, memo, allowed_TE=experts == group_T1)

    def _logits(self, params: Mapping[str, Array], x_TD: Array) -> Array:
        context = self._context
        if context.moe.inner_router == "topk":
            return router_logits(context.ops, x_TD, params["w_router"], context.moe.router_dtype)
        inside_TE = scaled(context, block_means(context, x_TD, self._size), self._size)
        return context.ops.concat([inside_TE] * self._groups, 1)

    def _group_of_sequence(self, tokens: Tokens) -> np.ndarray:
        if tokens.domains_S is None:
            raise ValueError("moe.router=hierarchical needs the domain of every sequence; pass Tokens.domains_S")
        return tokens.domains_S % self._groups

    def _tables(self) -> np.ndarray:
        """(groups * vocabulary, K): the groups' tables one below the other."""
        context, moe = self._context, self._context.moe
        size = vocabulary(context)
        key = (context.seed, "domain", context.layer)
        tables = [balanced_table(size, self._size, moe.top_k, *key, g) + g * self._size for g in range(self._groups)]
        return np.concatenate(tables)


def looked_up(context: RouterContext, table_VK: Array, rows_T: Array, x_TD: Array, memo: Memo) -> Choice:
    """The table's experts with equal weights (times route_scale)."""
    ops, moe = context.ops, context.moe
    chosen_TK = memo.once("chosen", lambda: ops.take_rows(table_VK, rows_T))
    ones_TK = ops.cast(chosen_TK >= 0, wide_dtype(ops, moe.router_dtype, x_TD))
    return Choice(chosen_TK, times(ops, ones_TK, moe.route_scale / moe.top_k))


def vocabulary(context: RouterContext) -> int:
    """Number of token ids; ValueError where nobody said."""
    if context.vocab_size is None:
        raise ValueError(f"moe.router={context.moe.router} routes by token id; build it with vocab_size")
    return context.vocab_size


def token_ids(tokens: Tokens) -> Array:
    """(T,) ids; ValueError where the layer was not given them."""
    if tokens.token_ids_T is None:
        raise ValueError("a router by token id needs Tokens.token_ids_T; pass the ids with the vectors")
    return tokens.token_ids_T
