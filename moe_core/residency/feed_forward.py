"""Rows through their experts: the fused operation where it knows the activation, its parts where it does not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...backends.protocol import Array, Ops
from ..config import MoeConfig
from ..routing.base import times


def expert_rows(ops: Ops, moe: MoeConfig, rows_ND: Array, stacks: Sequence[Array], counts_G: Array) -> Array:
    """out_ND of row blocks, counts[g] rows each; rows after the last block give exact zeros.

    stacks: w_up (G, D, F or 2F), w_down (G, F, D) and, under `moe.expert_bias`, b_up (G, F or 2F), b_down (G, D).
    """
    w_up, w_down = stacks[:2]
    if moe.activation != "swiglu_clamped" and not moe.expert_bias:
        return ops.expert_mlp(rows_ND, w_up, w_down, counts_G, moe.activation)
    up = ops.grouped_matmul(rows_ND, w_up, counts_G)
    group_N = group_of_rows(ops, rows_ND.shape[0], counts_G) if moe.expert_bias else None
    if group_N is not None:
        up = up + ops.take_rows(stacks[2], group_N)
    out = ops.grouped_matmul(activated(ops, moe, up), w_down, counts_G)
    return out if group_N is None else out + ops.take_rows(stacks[3], group_N)


def activated(ops: Ops, moe: MoeConfig, up: Array) -> Array:
    """The activation of (N, F or 2F), gate columns first.

    swiglu_clamped (gpt-oss): g = min(gate, limit), l = linear within +-limit; g sigmoid(alpha g) (l + 1).
    """
    half = up.shape[-1] // 2
    gate, linear = ops.split(up, [half, half], -1)
    if moe.activation == "swiglu":
        return gate * ops.sigmoid(gate) * linear
    limit = moe.swiglu_limit
    gate = ops.where(gate > limit, limit, gate)
    linear = ops.where(linear > limit, limit, ops.where(linear < -limit, -limit, linear))
    return gate * ops.sigmoid(times(ops, gate, moe.swiglu_alpha)) * (linear + 1)


def group_of_rows(ops: Ops, rows: int, counts_G: Array) -> Array:
    """(N,) the block that each row lies in, -1 after the last."""
    groups = counts_G.shape[0]
    upto_GG = ops.asarray(np.tril(np.ones((groups, groups), np.int64)))
    ends_G = (upto_GG * counts_G.reshape((1, -1))).sum(-1)
    past_NG = ops.asarray(np.arange(rows).reshape(-1, 1)) >= ends_G.reshape((1, -1))
    group_N = ops.where(past_NG, ops.asarray(np.ones((1, 1), np.int64)), 0).sum(-1)
    return ops.where(group_N < groups, group_N, -1)
