"""Learned top-k routers: softmax or sigmoid scores, and Switch (top-1)."""

from __future__ import annotations

from collections.abc import Mapping

from ...backends.protocol import Array, DType, Ops, Parameter
from ..config import MoeConfig
from ..parameters import draw_dense
from .base import Memo, Routing, Tokens, flatten_real
from .losses import load_balance_sequence, z_loss


class TopKRouter:
    """scores = softmax or sigmoid of x W; the k best are chosen; their scores weigh (Mixtral, Qwen, Switch)."""

    def __init__(self, ops: Ops, moe: MoeConfig, width: int, seed: int, std: float) -> None:
        self._ops, self._moe, self._width, self._seed, self._std = ops, moe, width, seed, std

    def parameters(self, prefix: str) -> tuple[Parameter, ...]:
        name, shape = f"{prefix}w_router", (self._width, self._moe.num_experts)
        return (Parameter(name, shape, draw_dense(self._seed, name, shape, self._std), master=True),)

    def route(self, params: Mapping[str, Array], x_TD: Array, tokens: Tokens, memo: Memo) -> Routing:
        ops, moe = self._ops, self._moe
        logits_TE = router_logits(ops, x_TD, params["w_router"], moe.router_dtype)
        probs_TE = ops.softmax(logits_TE) if moe.score_function == "softmax" else ops.sigmoid(logits_TE)
        chosen_TK = memo.once("chosen", lambda: ops.topk(logits_TE, moe.top_k))
        weights_TK = self._weights(logits_TE, probs_TE, chosen_TK)
        chosen_TK = flatten_real(ops, chosen_TK, tokens.real_T)
        return Routing(chosen_TK, chosen_TK, weights_TK, self._losses(logits_TE, probs_TE, chosen_TK, tokens))

    def _weights(self, logits_TE: Array, probs_TE: Array, chosen_TK: Array) -> Array:
        """Combine weights of the chosen: scores, renormalised (norm_topk_prob), times route_scale."""
        ops, moe = self._ops, self._moe
        if moe.softmax_order == "after_topk" and moe.score_function == "softmax":
            weights = ops.softmax(ops.take_along(logits_TE, chosen_TK))
        else:
            weights = ops.take_along(probs_TE, chosen_TK)
            if moe.norm_topk_prob and moe.top_k > 1:
                weights = weights / weights.sum(-1).reshape((-1, 1))
        return weights if moe.route_scale == 1.0 else weights * moe.route_scale

    def _losses(self, logits_TE: Array, probs_TE: Array, chosen_TK: Array, tokens: Tokens) -> dict[str, Array]:
        losses: dict[str, Array] = {}
        if self._moe.aux_loss_coeff:
            shares = probs_TE
            if self._moe.score_function == "sigmoid":
                shares = probs_TE / probs_TE.sum(-1).reshape((-1, 1))
            losses["load_balance"] = load_balance_sequence(self._ops, shares, chosen_TK, tokens)
        if self._moe.z_loss_coeff:
            losses["z"] = z_loss(self._ops, logits_TE, tokens)
        return losses


def router_logits(ops: Ops, x_TD: Array, w_router: Array, router_dtype: DType) -> Array:
    """x W in the wider of router_dtype and the dtype of the stored weight (accumulate_dtype)."""
    wide = "float64" if "float64" in (router_dtype, ops.dtype_of(w_router), ops.dtype_of(x_TD)) else "float32"
    return ops.cast(x_TD, wide) @ ops.cast(w_router, wide)
