"""Gates without parameters: grouped average pooling (LocMoE's GrAP) and its cosine form (Expert-Token Resonance)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ...backends.protocol import Array, Ops, Parameter
from .base import Choice, Memo, RouterContext, Tokens, times, wide_dtype
from .gate import gate


class GroupedAveragePooling:
    """Score of expert i = mean of the i-th of n equal blocks of channels (LocMoE, eq. 2-4).

    score_scale none: raw means (faithful); sqrt: times sqrt(d/n), unit variance, same choices. score_relu: eq. 2's
    ReLU, off by default because tokens without a positive block all tie at expert 0.
    """

    def __init__(self, context: RouterContext) -> None:
        check_blocks(context.width, context.moe.num_experts, "moe.num_experts")
        self._context = context

    def parameters(self, prefix: str) -> tuple[Parameter, ...]:
        del prefix
        return ()

    def choose(self, params: Mapping[str, Array], x_TD: Array, tokens: Tokens, memo: Memo) -> Choice:
        context, moe = self._context, self._context.moe
        means_TE = block_means(context, x_TD, moe.num_experts)
        choice = gate(context, scaled(context, means_TE, moe.num_experts), tokens, memo)
        if moe.capacity_rule == "factor":
            return choice
        return replace(choice, cosine_T=first_of(context.ops, cosines(context.ops, x_TD, means_TE), choice.chosen_TK))


class TokenResonance:
    """Tokens choose by cosine affinity to GrAP's vectors, then experts keep their best (ETR, eq. 4-6).

    Logits are the cosines (score_scale none) or sqrt(d) times them (sqrt: unit variance). Experts keep the highest
    affinities up to the capacity, and up to `affinity_mass` of their sum if that is set.
    """

    def __init__(self, context: RouterContext) -> None:
        check_blocks(context.width, context.moe.num_experts, "moe.num_experts")
        self._context = context

    def parameters(self, prefix: str) -> tuple[Parameter, ...]:
        del prefix
        return ()

    def choose(self, params: Mapping[str, Array], x_TD: Array, tokens: Tokens, memo: Memo) -> Choice:
        context, ops = self._context, self._context.ops
        affinity_TE = cosines(ops, x_TD, block_means(context, x_TD, context.moe.num_experts))
        scale = math.sqrt(context.width) if context.moe.score_scale == "sqrt" else 1.0
        choice = gate(context, times(ops, affinity_TE, scale), tokens, memo)
        affinity_TK = ops.stop_gradient(ops.take_along(affinity_TE, choice.chosen_TK))
        first_T = first_of(ops, affinity_TE, choice.chosen_TK) if context.moe.capacity_rule != "factor" else None
        return replace(choice, scores_TK=affinity_TK, cosine_T=first_T, best_first=True)


def check_blocks(width: int, num_blocks: int, field: str) -> None:
    """ValueError unless the channels split into equal blocks."""
    if width % num_blocks:
        raise ValueError(
            f"grouped average pooling cannot cut {width} channels into {num_blocks} equal blocks; "
            f"choose a {field} that divides {width}"
        )


def block_means(context: RouterContext, x_TD: Array, num_blocks: int) -> Array:
    """(T, n) mean of each block of d/n channels, in accumulate dtype."""
    ops = context.ops
    x_TD = ops.cast(x_TD, wide_dtype(ops, context.moe.router_dtype, x_TD))
    return x_TD.reshape((x_TD.shape[0], num_blocks, context.width // num_blocks)).mean(-1)


def scaled(context: RouterContext, means_TE: Array, num_blocks: int) -> Array:
    """Block means as logits: optional ReLU, optional factor sqrt(d/n)."""
    if context.moe.score_relu:
        means_TE = context.ops.relu(means_TE)
    if context.moe.score_scale == "none":
        return means_TE
    return times(context.ops, means_TE, math.sqrt(context.width / num_blocks))


def cosines(ops: Ops, x_TD: Array, means_TE: Array) -> Array:
    """cos(x, w_i) = <w_i, x> / (sqrt(n/d) |x|); 0 for a zero vector."""
    blocks, width = means_TE.shape[1], x_TD.shape[1]
    x_TD = ops.cast(x_TD, ops.dtype_of(means_TE))
    square_T1 = (x_TD * x_TD).sum(-1).reshape((-1, 1))
    norm_T1 = ops.sqrt(ops.where(square_T1 > 0, square_T1, 1.0))
    return times(ops, means_TE / norm_T1, math.sqrt(width / blocks))


def first_of(ops: Ops, x_TE: Array, chosen_TK: Array) -> Array:
    """(T,) value at each token's first choice, without gradient."""
    first = ops.split(chosen_TK, [1, chosen_TK.shape[1] - 1], 1)[0]
    return ops.take_along(ops.stop_gradient(x_TE), first).reshape((-1,))


def block_matrix(width: int, num_blocks: int) -> np.ndarray:
    """(n, d) the gate as a matrix: row i is n/d on block i and 0 elsewhere (LocMoE, eq. 4)."""
    return np.kron(np.eye(num_blocks), np.full((1, width // num_blocks), num_blocks / width))
