"""The router that every chooser sits in: bad tokens, choice, padding, capacity, losses, statistics. In this order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ...backends.protocol import Array, Parameter
from . import state as router_state
from .base import Choice, Chooser, Memo, RouterContext, Routing, State, Tokens, constant, flatten_real
from .capacity import group_capacity, within_capacity, within_mass
from .finite import NAN_TOKENS, count_true, non_finite_rows
from .locality import locality_loss, locality_statistics
from .losses import entropy_loss, load_balance_losses, z_loss
from .theory import cosine_edges


class ChooserRouter:
    """protocol `Router` around a `Chooser`."""

    def __init__(self, context: RouterContext, chooser: Chooser) -> None:
        self._context, self.chooser = context, chooser
        if context.moe.locality_gradient == "router" and not chooser.parameters(""):
            raise ValueError(
                f"moe.router={context.moe.router} has no parameters that could learn locality; "
                "set moe.locality_gradient=model"
            )

    def parameters(self, prefix: str) -> tuple[Parameter, ...]:
        return self.chooser.parameters(prefix)

    def initial_state(self) -> dict[str, np.ndarray]:
        return router_state.initial(self._context.moe)

    def update_state(self, state: State, totals: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return router_state.updated(self._context.moe, self._context.width, state, totals)

    def route(self, params: Mapping[str, Array], x_TD: Array, tokens: Tokens, memo: Memo) -> Routing:
        ops, real_T = self._context.ops, tokens.real_T
        x_TD, broken_T = self._without_broken(x_TD)
        if broken_T is not None:
            tokens = replace(tokens, real_T=~broken_T if real_T is None else real_T & ~broken_T)
        choice = self.chooser.choose(params, x_TD, tokens, memo)
        nan_T = non_finite_rows(ops, x_TD) if choice.nan_T is None else choice.nan_T
        nan_T = nan_T if broken_T is None else nan_T | broken_T
        weights_TK = choice.weights_TK
        if choice.unusable_T is not None:
            usable_T = ~choice.unusable_T
            tokens = replace(tokens, real_T=usable_T if tokens.real_T is None else tokens.real_T & usable_T)
        if self._context.moe.nan_policy == "skip" and tokens.real_T is not None:
            weights_TK = ops.where(tokens.real_T.reshape((-1, 1)), weights_TK, 0.0)
        chosen_TK = flatten_real(ops, choice.chosen_TK, tokens.real_T)
        ids_TK = self._kept(choice, chosen_TK, tokens, memo)
        losses = self._losses(params, x_TD, choice, chosen_TK, tokens, memo)
        statistics = self._statistics(choice, ids_TK, nan_T, replace(tokens, real_T=real_T))
        return Routing(chosen_TK, ids_TK, weights_TK, losses, statistics, nan_T)

    def _without_broken(self, x_TD: Array) -> tuple[Array, Array | None]:
        """Under nan_policy skip: zeros for vectors that are not finite (0 x NaN would reach the gate's gradient)."""
        ops = self._context.ops
        if self._context.moe.nan_policy == "raise":
            return x_TD, None
        broken_T = non_finite_rows(ops, x_TD)
        return ops.where(broken_T.reshape((-1, 1)), 0.0, x_TD), broken_T

    def _kept(self, choice: Choice, chosen_TK: Array, tokens: Tokens, memo: Memo) -> Array:
        """Ids after capacity: -1 = dropped."""
        ops, moe = self._context.ops, self._context.moe
        if choice.kept_TK is not None:
            return flatten_real(ops, choice.kept_TK, tokens.real_T)
        if moe.capacity_factor is None and moe.capacity_rule == "factor" and moe.affinity_mass is None:
            return chosen_TK
        scores_TK = ops.stop_gradient(choice.weights_TK if choice.scores_TK is None else choice.scores_TK)
        groups = max(tokens.sequences, 1) if moe.capacity_group == "sequence" else 1

        def decide() -> Array:
            ids_TK = chosen_TK
            capacity = group_capacity(self._context, tokens, chosen_TK.shape[0], memo.state)
            if capacity is not None:
                by_score = scores_TK if choice.best_first or moe.drop_policy == "score" else None
                kept = within_capacity(ops, ids_TK, by_score, groups, moe.num_experts, capacity)
                ids_TK = ops.where(kept, ids_TK, -1)
            if moe.affinity_mass is not None:
                kept = within_mass(ops, chosen_TK, scores_TK, groups, moe.num_experts, moe.affinity_mass)
                ids_TK = ops.where(kept, ids_TK, -1)
            return ids_TK

        return memo.once("kept", decide)

    def _losses(
        self, params: Mapping[str, Array], x_TD: Array, choice: Choice, chosen_TK: Array, tokens: Tokens, memo: Memo
    ) -> dict[str, Array]:
        context, ops, moe = self._context, self._context.ops, self._context.moe
        losses: dict[str, Array] = {}
        shares_TE = choice.shares_TE
        if shares_TE is not None:
            if moe.aux_loss_coeff:
                losses |= load_balance_losses(context, shares_TE, chosen_TK, tokens)
            if moe.entropy_loss_coeff:
                losses["entropy"] = entropy_loss(ops, shares_TE, tokens)
            if moe.locality_loss_coeff and moe.locality_nodes > 1:
                if moe.locality_gradient == "router":
                    # the same scores once more, cut from the rest of the model
                    apart = self.chooser.choose(params, ops.stop_gradient(x_TD), tokens, memo)
                    shares_TE = apart.shares_TE
                losses["locality"] = locality_loss(context, shares_TE, tokens)
        if moe.z_loss_coeff and choice.logits_TE is not None:
            losses["z"] = z_loss(ops, choice.logits_TE, tokens)
        return losses

    def _statistics(self, choice: Choice, ids_TK: Array, nan_T: Array, tokens: Tokens) -> dict[str, Array]:
        ops, moe = self._context.ops, self._context.moe
        statistics = {NAN_TOKENS: count_true(ops, nan_T, tokens.real_T)}
        if moe.locality_nodes > 1:
            statistics |= locality_statistics(self._context, ids_TK, tokens)
        if choice.cosine_T is not None:
            statistics[router_state.COSINES] = self._cosine_counts(choice.cosine_T, tokens)
        return statistics

    def _cosine_counts(self, cosine_T: Array, tokens: Tokens) -> Array:
        """(B,) real tokens whose cosine reaches each edge."""
        ops = self._context.ops
        edges_B = cosine_edges(self._context.width)
        edges = constant(ops, edges_B, ops.dtype_of(cosine_T)).reshape((1, -1))
        reached = cosine_T.reshape((-1, 1)) >= edges
        if tokens.real_T is not None:
            reached = reached & tokens.real_T.reshape((-1, 1))
        return ops.count(ops.where(reached, ops.asarray(np.arange(len(edges_B)).reshape(1, -1)), -1), len(edges_B))
