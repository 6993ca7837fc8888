"""Locality (LocMoE): the loss that draws tokens to experts on their home node, and what is measured of it.

A node here is virtual: `moe.locality_nodes` of them share the global batch by position, whatever the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...backends.protocol import Array
from ..config import MoeConfig
from ..planners.static import owners
from .base import RouterContext, Tokens, constant, only_real, times

NODE_ROWS = "node_rows"
"""Statistic (nodes x nodes, flat): kept rows by home of the token and node of the expert."""
TOKEN_NODES = "token_nodes"
"""Statistic (vocabulary x nodes, flat): kept rows by token id and node of the expert."""


def expert_nodes(moe: MoeConfig) -> np.ndarray:
    """(E,) node of each expert: `locality_expert_nodes`, else contiguous shares. ValueError for a bad map."""
    if moe.locality_expert_nodes is None:
        return owners(moe.num_experts, moe.locality_nodes)
    nodes_E = np.asarray(moe.locality_expert_nodes, np.int64)
    if len(nodes_E) != moe.num_experts or nodes_E.min() < 0 or nodes_E.max() >= moe.locality_nodes:
        raise ValueError(
            f"moe.locality_expert_nodes={moe.locality_expert_nodes} must give each of the {moe.num_experts} experts "
            f"a node from 0 to {moe.locality_nodes - 1}"
        )
    return nodes_E


def home_nodes(tokens: Tokens, nodes: int) -> np.ndarray:
    """(S,) home of each sequence: equal runs of the global batch."""
    positions = tokens.positions()
    return positions * nodes // max(tokens.global_sequences or len(positions), 1)


def local_distribution(node_E: np.ndarray, nodes: int, smoothing: float) -> np.ndarray:
    """(R, E) the distribution that each node is drawn to: (1-e)/m_r on its m_r experts, e/(n-m_r) elsewhere.

    Rows of nodes with none or all of the experts are uniform (they carry no loss, see `has_choice`).
    """
    local_RE = node_E[None] == np.arange(nodes)[:, None]
    m_R1 = local_RE.sum(1, keepdims=True)
    n = len(node_E)
    target = np.where(local_RE, (1 - smoothing) / np.maximum(m_R1, 1), smoothing / np.maximum(n - m_R1, 1))
    return np.where((m_R1 > 0) & (m_R1 < n), target, 1 / n)


def has_choice(node_E: np.ndarray, nodes: int) -> np.ndarray:
    """(R,) whether a node holds some of the experts but not all: others carry no loss."""
    held_R = np.bincount(node_E, minlength=nodes)
    return (held_R > 0) & (held_R < len(node_E))


def locality_loss(context: RouterContext, shares_TE: Array, tokens: Tokens) -> Array:
    """sum_r (T_r/T) KL(q_r || D_r): q_r = mean probabilities over the tokens at home on r (LocMoE, eq. 6, smoothed).

    scope node: q_r is pooled over all ranks (of one micro-batch); sequence: each sequence has its own q, so that
    neither ranks nor micro-batches matter. Gradient: probabilities sum to 1, hence d KL / d p = ln(q/D) + constant,
    and the logarithm can stand outside the graph without changing value or gradient.
    """
    ops, moe = context.ops, context.moe
    nodes, node_E = moe.locality_nodes, expert_nodes(moe)
    wide = ops.dtype_of(shares_TE)
    homes_S = home_nodes(tokens, nodes)
    mass_SE = only_real(ops, shares_TE, tokens.real_T).reshape((tokens.sequences, -1, moe.num_experts)).sum(1)
    target = np.log(local_distribution(node_E, nodes, moe.locality_smoothing))
    weight = has_choice(node_E, nodes).astype(np.float64)[:, None]
    if moe.locality_scope == "node":
        member_RS1 = (homes_S[None] == np.arange(nodes)[:, None]).astype(np.float64)[..., None]
        mass_GE = (constant(ops, member_RS1, wide) * mass_SE.reshape((1, *mass_SE.shape))).sum(1)
        everyone_GE = context.pooled(mass_GE)
    else:
        mass_GE, everyone_GE = mass_SE, ops.stop_gradient(mass_SE)
        target, weight = target[homes_S], weight[homes_S]
    count_G1 = everyone_GE.sum(-1).reshape((-1, 1))
    q_GE = everyone_GE / ops.where(count_G1 > 0, count_G1, 1.0)
    log_q_GE = ops.log(ops.where(q_GE > 0, q_GE, 1.0))
    ratio_GE = (log_q_GE - constant(ops, target, wide)) * constant(ops, weight, wide)
    divergence = (ops.stop_gradient(ratio_GE) * mass_GE).sum(-1).sum(-1)
    return times(ops, divergence, 1.0 / (tokens.total * tokens.layers))


def locality_statistics(context: RouterContext, ids_TK: Array, tokens: Tokens) -> dict[str, Array]:
    """Rows by (home of the token, node of its expert), and by (token id, node) where ids are known; not those at -1."""
    ops, nodes = context.ops, context.moe.locality_nodes
    length = ids_TK.shape[0] // max(tokens.sequences, 1)
    home_T1 = ops.asarray(np.repeat(home_nodes(tokens, nodes), length).reshape(-1, 1))
    table_E = ops.asarray(expert_nodes(context.moe))
    node_TK = ops.take_rows(table_E, ops.where(ids_TK >= 0, ids_TK, 0).reshape((-1,))).reshape(ids_TK.shape)
    found = {NODE_ROWS: ops.count(ops.where(ids_TK >= 0, home_T1 * nodes + node_TK, -1), nodes * nodes)}
    if context.vocab_size is not None and tokens.token_ids_T is not None:
        keys_TK = tokens.token_ids_T.reshape((-1, 1)) * nodes + node_TK
        found[TOKEN_NODES] = ops.count(ops.where(ids_TK >= 0, keys_TK, -1), context.vocab_size * nodes)
    return found


def local_share(totals: Mapping[str, np.ndarray]) -> float:
    """Share of kept rows whose expert lives on the token's home node. 1 where there are no rows."""
    rows = np.asarray(totals[NODE_ROWS], np.float64)
    nodes = round(len(rows) ** 0.5)
    return float(np.trace(rows.reshape(nodes, nodes)) / rows.sum()) if rows.sum() else 1.0


def uniform_local_share(moe: MoeConfig, rows_R: np.ndarray | None = None) -> float:
    """Local share of a router that knows nothing: sum_r (T_r/T) m_r/n. rows_R: tokens by home (None: equal)."""
    held_R = np.bincount(expert_nodes(moe), minlength=moe.locality_nodes) / moe.num_experts
    share_R = np.full(moe.locality_nodes, 1 / moe.locality_nodes) if rows_R is None else rows_R / max(rows_R.sum(), 1)
    return float((held_R * share_R).sum())


def hard_locality(node_rows_E: np.ndarray, moe: MoeConfig) -> float:
    """KL of counted assignments, (R, E) rows by home and expert, to the local distribution: the loss as a metric."""
    nodes, node_E = moe.locality_nodes, expert_nodes(moe)
    target_RE = local_distribution(node_E, nodes, moe.locality_smoothing)
    rows_R1 = node_rows_E.sum(1, keepdims=True)
    q_RE = node_rows_E / np.maximum(rows_R1, 1)
    log_RE = np.log(np.where(q_RE > 0, q_RE, 1) / np.where(q_RE > 0, target_RE, 1))
    kl_R = (q_RE * log_RE).sum(1) * has_choice(node_E, nodes)
    return float((kl_R * rows_R1[:, 0]).sum() / max(rows_R1.sum(), 1))
