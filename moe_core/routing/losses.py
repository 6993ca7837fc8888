"""Auxiliary losses as local contributions: summed over ranks and micro-batches they are the global loss."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...backends.protocol import Array, Ops
from ..config import MoeConfig
from .base import RouterContext, Tokens, only_real, times

COUNTS, MASS = "load_balance/counts", "load_balance/mass"
"""Parts of the load-balance loss that `aux_loss_layers: concatenated` adds up over the layers."""


def loss_coefficients(moe: MoeConfig, step: int | None = None) -> dict[str, float]:
    """Weight of each loss at a step (None: after every ramp). Locality rises linearly from its start step."""
    ramp = 1.0
    if step is not None and step < moe.locality_start_step + moe.locality_ramp_steps:
        ramp = max(0.0, step - moe.locality_start_step) / max(1, moe.locality_ramp_steps)
    return {
        "load_balance": moe.aux_loss_coeff,
        "z": moe.z_loss_coeff,
        "locality": moe.locality_loss_coeff * ramp,
        "entropy": moe.entropy_loss_coeff,
    }


def load_balance_losses(context: RouterContext, shares_TE: Array, chosen_TK: Array, tokens: Tokens) -> dict[str, Array]:
    """{'load_balance': loss}, or its two parts where layers are concatenated first (`combine_layers` ends it).

    chosen_TK: before dropping. scope sequence: each sequence is balanced; global: f is pooled over all ranks.
    """
    ops, moe = context.ops, context.moe
    pooled = moe.aux_loss_scope == "global"
    counts_GE, mass_GE = balance_parts(ops, shares_TE, chosen_TK, tokens, 1 if pooled else tokens.sequences)
    if pooled:
        counts_GE = context.pooled(counts_GE)
    if moe.aux_loss_layers == "concatenated":
        return {COUNTS: counts_GE, MASS: mass_GE}
    return {"load_balance": load_balance(counts_GE, mass_GE, ops, tokens.total * tokens.layers)}


def combine_layers(
    ops: Ops, moe: MoeConfig, losses: Mapping[str, Array], total: float, layers: int
) -> dict[str, Array]:
    """Losses summed over layers -> losses of the model. total: real tokens of the step; layers: MoE layers.

    Concatenated layers (Hugging Face): f and P are means over the tokens of all layers, then multiplied. Hugging
    Face's f sums to top_k, so its coefficient is ours divided by top_k.
    """
    whole = dict(losses)
    if moe.aux_loss_layers == "concatenated" and COUNTS in whole:
        whole["load_balance"] = load_balance(whole.pop(COUNTS), whole.pop(MASS), ops, total * layers)
    return whole


def balance_parts(ops: Ops, shares_TE: Array, chosen_TK: Array, tokens: Tokens, groups: int) -> tuple[Array, Array]:
    """(counts_GE, mass_GE) of `groups` equal runs of tokens: choices of each expert, and summed probabilities."""
    num_tokens, num_experts = shares_TE.shape
    length = num_tokens // max(groups, 1)
    keys = chosen_TK
    if groups > 1:
        group_T1 = ops.asarray(np.arange(num_tokens).reshape(-1, 1) // max(length, 1))
        keys = ops.where(chosen_TK >= 0, group_T1 * num_experts + chosen_TK, -1)
    counts = ops.cast(ops.count(keys, groups * num_experts), ops.dtype_of(shares_TE))
    mass_GE = only_real(ops, shares_TE, tokens.real_T).reshape((groups, length, num_experts)).sum(1)
    return counts.reshape((groups, num_experts)), mass_GE


def load_balance(counts_GE: Array, mass_GE: Array, ops: Ops, tokens: float) -> Array:
    """(1 / tokens) sum over groups of n_g E sum_e f_e P_e (Switch, eq. 4): 1 when balanced, E when collapsed.

    f = counts / their sum (sums to 1, no gradient); n_g P = mass. A group of padding contributes zero.
    """
    chosen_G1 = counts_GE.sum(-1).reshape((-1, 1))
    f_GE = counts_GE / ops.where(chosen_G1 > 0, chosen_G1, 1.0)
    return times(ops, (f_GE * mass_GE).sum(-1).sum(-1), counts_GE.shape[-1] / tokens)


def z_loss(ops: Ops, logits_TE: Array, tokens: Tokens) -> Array:
    """(1/layers) mean over real tokens of logsumexp(logits)^2 (ST-MoE, eq. 5)."""
    lse_T1 = ops.logsumexp(logits_TE).reshape((-1, 1))
    squares = only_real(ops, lse_T1 * lse_T1, tokens.real_T).sum(-1).sum(-1)
    return times(ops, squares, 1.0 / (tokens.total * tokens.layers))


def entropy_loss(ops: Ops, shares_TE: Array, tokens: Tokens) -> Array:
    """(1/layers) mean over real tokens of -sum_e p_e ln p_e, in nats: a positive coefficient sharpens the router."""
    log_TE = ops.log(ops.where(shares_TE > 0, shares_TE, 1.0))
    surprise_TE = only_real(ops, shares_TE * log_TE, tokens.real_T)
    return times(ops, surprise_TE.sum(-1).sum(-1), -1.0 / (tokens.total * tokens.layers))
