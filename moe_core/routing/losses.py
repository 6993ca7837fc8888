"""Auxiliary losses as local contributions: summed over ranks and micro-batches they are the global loss."""

from __future__ import annotations

import numpy as np

from ...backends.protocol import Array, Ops
from .base import Tokens


def load_balance_sequence(ops: Ops, probs_TE: Array, chosen_TK: Array, tokens: Tokens) -> Array:
    """(1/layers) sum over sequences s of (n_s / N) E sum_e f_se P_se (Switch, eq. 4, taken per sequence).

    f: share of the choices of s (sums to 1, no gradient, before dropping); P: mean probability over its n_s real
    tokens; N: `tokens.total`. A sequence of padding contributes zero.
    """
    num_experts, sequences = probs_TE.shape[-1], tokens.sequences
    length = probs_TE.shape[0] // max(sequences, 1)
    sequence_T1 = ops.asarray(np.arange(probs_TE.shape[0]).reshape(-1, 1) // max(length, 1))
    keys = ops.where(chosen_TK >= 0, sequence_T1 * num_experts + chosen_TK, -1)
    counts = ops.cast(ops.count(keys, sequences * num_experts), ops.dtype_of(probs_TE))
    counts_SE = counts.reshape((sequences, num_experts))
    chosen_S1 = counts_SE.sum(-1).reshape((-1, 1))
    f_SE = counts_SE / ops.where(chosen_S1 > 0, chosen_S1, 1.0)
    mass_SE = _real(ops, probs_TE, tokens).reshape((sequences, length, num_experts)).sum(1)  # n_s P_s
    return (f_SE * mass_SE).sum(-1).sum(-1) * (num_experts / (tokens.total * tokens.layers))


def z_loss(ops: Ops, logits_TE: Array, tokens: Tokens) -> Array:
    """(1/layers) mean over real tokens of logsumexp(logits)^2 (ST-MoE, eq. 5)."""
    lse_T1 = ops.logsumexp(logits_TE).reshape((-1, 1))
    return _real(ops, lse_T1 * lse_T1, tokens).sum(-1).sum(-1) * (1.0 / (tokens.total * tokens.layers))


def _real(ops: Ops, x_TE: Array, tokens: Tokens) -> Array:
    """x with the rows of padding tokens set to zero."""
    return x_TE if tokens.real_T is None else ops.where(tokens.real_T.reshape((-1, 1)), x_TE, 0.0)
