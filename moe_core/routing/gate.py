"""Logits -> ids and weights: the recipe that learned, pooled and cosine gates share."""

from __future__ import annotations

import math

import numpy as np

from ...backends.protocol import Array, Ops
from ..config import MoeConfig
from .base import Choice, Memo, RouterContext, Tokens, constant, times
from .finite import screen
from .keyed import uniform_noise


def gate(
    context: RouterContext, logits_TE: Array, tokens: Tokens, memo: Memo, allowed_TE: Array | None = None
) -> Choice:
    """Jitter, scores, (group limit, bias), top-k, weights. allowed_TE: boolean, experts that a token may use.

    Ids come from scores + bias, weights from the scores alone (DeepSeek-V3); ties go to the lower id.
    """
    ops, moe = context.ops, context.moe
    screened = screen(ops, moe.nan_policy, jittered(context, logits_TE, tokens, memo))
    logits_TE = screened.logits_TE
    if allowed_TE is not None:
        logits_TE = ops.where(allowed_TE, logits_TE, -math.inf)
    scores_TE = ops.softmax(logits_TE) if moe.score_function == "softmax" else ops.sigmoid(logits_TE)
    chosen_TK = memo.once("chosen", lambda: ops.topk(_ranking(context, logits_TE, scores_TE, memo), moe.top_k))
    picked_TK = ops.take_along(scores_TE, chosen_TK)
    return Choice(
        chosen_TK,
        _weights(ops, moe, logits_TE, picked_TK, chosen_TK),
        scores_TK=ops.stop_gradient(picked_TK),
        shares_TE=_shares(ops, moe, scores_TE),
        logits_TE=logits_TE,
        nan_T=screened.nan_T,
        unusable_T=screened.unusable_T,
    )


def jittered(context: RouterContext, logits_TE: Array, tokens: Tokens, memo: Memo) -> Array:
    """Logits times noise in [1 - eps, 1 + eps), in training only, keyed by (seed, layer, step, token)."""
    ops, moe = context.ops, context.moe
    if not moe.router_jitter or not tokens.training or not tokens.sequences:
        return logits_TE

    def draw() -> Array:
        shape = (logits_TE.shape[0] // tokens.sequences, logits_TE.shape[1])
        key = (context.seed, "jitter", context.layer, tokens.step)
        parts = [uniform_noise(shape, moe.router_jitter, *key, int(p)) for p in tokens.positions()]
        return constant(ops, np.concatenate(parts), ops.dtype_of(logits_TE))

    return logits_TE * memo.once("jitter", draw)


def _ranking(context: RouterContext, logits_TE: Array, scores_TE: Array, memo: Memo) -> Array:
    """What top-k sees: logits (no ties by rounding), or scores with bias and group limit."""
    ops, moe = context.ops, context.moe
    if not moe.bias_update_rate and moe.num_groups == 1:
        return logits_TE
    ranking_TE = ops.stop_gradient(scores_TE)
    if moe.bias_update_rate:
        bias_E = memo.state.get("bias", np.zeros(moe.num_experts))
        ranking_TE = ranking_TE + constant(ops, np.asarray(bias_E), ops.dtype_of(scores_TE))
    return ranking_TE if moe.num_groups == 1 else limit_to_groups(ops, moe, ranking_TE)


def limit_to_groups(ops: Ops, moe: MoeConfig, ranking_TE: Array) -> Array:
    """Minus infinity outside each token's `group_top_k` best of `num_groups` groups of neighbouring experts.

    A group is rated by the sum of its `group_score_top` best (DeepSeek-V3: 2; 1 gives DeepSeek-V2's maximum).
    """
    num_tokens, num_experts = ranking_TE.shape
    groups, size = moe.num_groups, num_experts // moe.num_groups
    grouped = ranking_TE.reshape((num_tokens * groups, size))
    best = ops.take_along(grouped, ops.topk(grouped, min(moe.group_score_top, size)))
    chosen_TG = ops.topk(best.sum(-1).reshape((num_tokens, groups)), moe.group_top_k)
    inside = chosen_TG.reshape((num_tokens, 1, moe.group_top_k)) == ops.asarray(np.arange(groups).reshape(1, groups, 1))
    open_TG = ops.cast(inside, ops.dtype_of(ranking_TE)).sum(-1) > 0
    limited = ops.where(open_TG.reshape((-1, 1)), grouped, -math.inf)
    return limited.reshape((num_tokens, num_experts))


def _weights(ops: Ops, moe: MoeConfig, logits_TE: Array, picked_TK: Array, chosen_TK: Array) -> Array:
    """Combine weights of the chosen: scores, renormalised (norm_topk_prob, top_k > 1), times route_scale."""
    if moe.softmax_order == "after_topk" and moe.score_function == "softmax":
        weights = ops.softmax(ops.take_along(logits_TE, chosen_TK))
    elif moe.norm_topk_prob and moe.top_k > 1:
        total_T1 = picked_TK.sum(-1).reshape((-1, 1))
        weights = picked_TK / ops.where(total_T1 == 0, 1.0, total_T1)
    else:
        weights = picked_TK
    return weights if moe.route_scale == 1.0 else times(ops, weights, moe.route_scale)


def _shares(ops: Ops, moe: MoeConfig, scores_TE: Array) -> Array | None:
    """Scores as probabilities that sum to 1, where a loss wants them."""
    if not (moe.aux_loss_coeff or moe.locality_loss_coeff or moe.entropy_loss_coeff):
        return None
    if moe.score_function == "softmax":
        return scores_TE
    total_T1 = scores_TE.sum(-1).reshape((-1, 1))
    return scores_TE / ops.where(total_T1 == 0, 1.0, total_T1)
