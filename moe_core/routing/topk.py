"""Learned gates: scores = softmax or sigmoid of x W (Mixtral, Qwen, Switch, DeepSeek)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...backends.protocol import Array, DType, Ops, Parameter
from ..parameters import draw_dense
from .base import Choice, Memo, RouterContext, Tokens, wide_dtype
from .gate import gate


class LearnedGate:
    """One gate vector per expert. Options of `moe` make it Mixtral's, Switch's or DeepSeek-V3's."""

    def __init__(self, context: RouterContext) -> None:
        self._context = context

    def parameters(self, prefix: str) -> tuple[Parameter, ...]:
        return (router_weight(self._context, prefix), *router_bias(self._context, prefix))

    def choose(self, params: Mapping[str, Array], x_TD: Array, tokens: Tokens, memo: Memo) -> Choice:
        context, w_router = self._context, params["w_router"]
        logits_TE = router_logits(context.ops, x_TD, w_router, context.moe.router_dtype)
        if context.moe.router_bias:
            logits_TE = logits_TE + context.ops.cast(params["b_router"], context.ops.dtype_of(logits_TE))
        choice = gate(context, logits_TE, tokens, memo)
        if context.moe.capacity_rule == "factor":
            return choice
        return replace(choice, cosine_T=_first_cosine(context.ops, x_TD, w_router, logits_TE, choice.chosen_TK))


def router_weight(context: RouterContext, prefix: str) -> Parameter:
    """w_router (width, num_experts)."""
    name, shape = f"{prefix}w_router", (context.width, context.moe.num_experts)
    return Parameter(name, shape, draw_dense(context.seed, name, shape, context.std), master=True)


def router_bias(context: RouterContext, prefix: str) -> tuple[Parameter, ...]:
    """b_router (num_experts,), learned by gradient, under `moe.router_bias`."""
    if not context.moe.router_bias:
        return ()
    name, shape = f"{prefix}b_router", (context.moe.num_experts,)
    initial = draw_dense(context.seed, name, shape, "zeros")
    return (Parameter(name, shape, initial, weight_decay=False, master=True),)


def router_logits(ops: Ops, x_TD: Array, w_router: Array, router_dtype: DType) -> Array:
    """x W in the wider of router_dtype and the dtype of the stored weight (accumulate_dtype)."""
    wide = wide_dtype(ops, router_dtype, w_router, x_TD)
    return ops.cast(x_TD, wide) @ ops.cast(w_router, wide)


def _first_cosine(ops: Ops, x_TD: Array, w_DE: Array, logits_TE: Array, chosen_TK: Array) -> Array:
    """(T,) cosine between each token and the gate vector of its first choice; 0 for zero vectors."""
    wide = ops.dtype_of(logits_TE)
    x_TD, w_DE = (ops.cast(ops.stop_gradient(a), wide) for a in (x_TD, w_DE))
    squares_TE = (x_TD * x_TD).sum(-1).reshape((-1, 1)) * (w_DE * w_DE).sum(0).reshape((1, -1))
    cosine_TE = ops.stop_gradient(logits_TE) / ops.sqrt(ops.where(squares_TE > 0, squares_TE, 1.0))
    first = ops.split(chosen_TK, [1, chosen_TK.shape[1] - 1], 1)[0]
    return ops.take_along(cosine_TE, first).reshape((-1,))
