"""The routers of a rank's heads, all at once: scores are taken tile by tile and never written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ..backends.protocol import Array, Parameter, Piece
from .heads_exchange import Heads
from .parameters import draw
from .routing import state as router_state
from .routing.base import Memo, RouterContext, Routing, State, Tokens, constant, flatten_real, wide_dtype
from .routing.losses import entropy_loss, load_balance_losses, z_loss


class HeadsRouter:
    """Head h chooses the k largest of u_h R_h + b_h; the softmax of the chosen u_h R_h weighs.

    context: width d_h, `moe` of one head (num_experts per head), comm and group of the ranks that share the heads.
    """

    def __init__(self, context: RouterContext, heads: Heads) -> None:
        self._context, self._heads = context, heads

    def parameters(self, prefix: str) -> tuple[Parameter, ...]:
        """w_router (heads of this rank, d_h, E), drawn by global head."""
        context, heads, name = self._context, self._heads, f"{prefix}w_router"
        shape, mine = (heads.dim, heads.experts), range(heads.first, heads.first + heads.count)
        return (
            Parameter(
                name,
                (heads.count, *shape),
                lambda: np.stack([draw(context.seed, name, shape, context.std, expert=h) for h in mine]),
                reduce_over="head_data",
                norm_over="head",
                master=True,
                pieces=tuple(Piece(f"{prefix}heads.{h}.w_router", shape) for h in mine),
            ),
        )

    def initial_state(self) -> dict[str, np.ndarray]:
        """bias (N_h, E) of all heads, where it is balanced."""
        shape = (self._heads.total, self._heads.experts)
        return {"bias": np.zeros(shape)} if self._context.moe.bias_update_rate else {}

    def update_state(self, state: State, totals: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """b_h += u (s - mean(s)) with s = sign(mean load - load), per head, once per optimizer step."""
        if "bias" not in state:
            return dict(state)
        moe, bias = self._context.moe, np.asarray(state["bias"])
        loads = np.asarray(totals[router_state.CHOSEN]).reshape(bias.shape)
        steps = [router_state.bias_step(load_E, moe.bias_update_rate, moe.bias_update_rule) for load_E in loads]
        return {**state, "bias": bias + np.stack(steps)}

    def route(self, params: Mapping[str, Array], x_TD: Array, tokens: Tokens, memo: Memo) -> Routing:
        """x_TD: (N count, d_h), sub-tokens by (token, head); tokens: the N tokens. Ids h * E + e, rows as in x_TD."""
        context, heads, ops = self._context, self._heads, self._context.ops
        self._refuse_one_expert(tokens)
        rows, count = x_TD.shape[0], heads.count
        num_tokens = rows // count
        x_NHD = x_TD.reshape((num_tokens, count, heads.dim))
        w_HDE = ops.cast(params["w_router"], wide_dtype(ops, context.moe.router_dtype, params["w_router"], x_TD))
        bias_HE = self._bias(memo, w_HDE)
        logits, ids = ops.router_topk(x_NHD, w_HDE, bias_HE, context.moe.top_k, memo.decided.get("chosen"))
        ids = memo.once("chosen", lambda: ids)
        weights = ops.softmax(logits).reshape((rows, -1))
        weights = weights if context.moe.route_scale == 1.0 else weights * context.moe.route_scale
        first = ops.asarray((np.arange(count) * heads.experts).reshape((1, count, 1)))
        chosen = flatten_real(ops, (ids + first).reshape((num_tokens, -1)), tokens.real_T).reshape((rows, -1))
        losses = self._losses(x_NHD, w_HDE, ids, tokens)
        return Routing(chosen, chosen, weights, losses, nan_T=self._non_finite(logits))

    def _refuse_one_expert(self, tokens: Tokens) -> None:
        moe = self._context.moe
        if tokens.training and moe.top_k == 1 and moe.num_experts > 1:
            raise ValueError(
                "moe.top_k=1 cannot be trained with moe.num_heads > 1: the one weight is always 1 and the router gets "
                "no gradient; choose top_k >= 2"
            )

    def _bias(self, memo: Memo, w_HDE: Array) -> Array | None:
        if not self._context.moe.bias_update_rate or "bias" not in memo.state:
            return None
        mine = np.asarray(memo.state["bias"])[self._heads.first : self._heads.first + self._heads.count]
        return constant(self._context.ops, mine, self._context.ops.dtype_of(w_HDE))

    def _non_finite(self, logits_NHK: Array) -> Array:
        """(N,) tokens with a chosen logit that is not finite, in any head of this rank."""
        ops = self._context.ops
        bad = ops.stop_gradient(logits_NHK).reshape((logits_NHK.shape[0], -1)).sum(-1)
        return (bad - bad) != 0

    def _losses(self, x_NHD: Array, w_HDE: Array, ids_NHK: Array, tokens: Tokens) -> dict[str, Array]:
        """Auxiliary losses, means over all heads. They need all scores: one head's at a time, and again in backward."""
        moe, ops = self._context.moe, self._context.ops
        if not (moe.aux_loss_coeff or moe.z_loss_coeff or moe.entropy_loss_coeff):
            return {}
        ones, rows = [1] * self._heads.count, x_NHD.shape[0]
        per_head = zip(ops.split(x_NHD, ones, 1), ops.split(w_HDE, ones), ops.split(ids_NHK, ones, 1), strict=True)
        shared = replace(tokens, layers=tokens.layers * self._heads.total)
        total: dict[str, Array] = {}
        for x, w, ids in per_head:
            ids_TK = flatten_real(ops, ids.reshape((rows, -1)), tokens.real_T)
            x_TD, w_DE = x.reshape((rows, -1)), w.reshape(w.shape[1:])
            found = ops.checkpoint(lambda x, w, i: one_head_losses(self._context, x, w, i, shared), x_TD, w_DE, ids_TK)
            total = {name: total[name] + value if name in total else value for name, value in found.items()}
        return total


def one_head_losses(
    context: RouterContext, x_TD: Array, w_DE: Array, chosen_TK: Array, tokens: Tokens
) -> dict[str, Array]:
    """Load balance, z and entropy losses of one head, from all of its scores."""
    ops, moe = context.ops, context.moe
    logits_TE = ops.cast(x_TD, ops.dtype_of(w_DE)) @ w_DE
    shares_TE, losses = ops.softmax(logits_TE), {}
    if moe.aux_loss_coeff:
        losses |= load_balance_losses(context, shares_TE, chosen_TK, tokens)
    if moe.entropy_loss_coeff:
        losses["entropy"] = entropy_loss(ops, shares_TE, tokens)
    if moe.z_loss_coeff:
        losses["z"] = z_loss(ops, logits_TE, tokens)
    return losses
