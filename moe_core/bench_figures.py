"""Exact bytes and rows of a benchmarked layer, ceilings against plain expert parallelism, and modelled times."""

from __future__ import annotations

from typing import Any

import numpy as np

from .layer import LayerStats
from .plan import Plan
from .topology import Topology


def own_figures(stats: LayerStats, topology: Topology, rank: int, row_bytes: int, flat: Plan) -> np.ndarray:
    """What one rank sends and computes: bytes by level (dispatch and combine), rows and bytes out of its node, its
    rows; the same of plain expert parallelism; bytes inside its tensor group."""
    assert stats.plan is not None
    bytes_by_level = np.zeros(topology.depth)
    back_out = 0.0
    for traffic in stats.exchange.traffic:
        back = _own(topology, traffic.returned, rank)
        bytes_by_level += _own(topology, traffic.sent, rank) + back
        back_out += back[0]
    flat_out = 2 * _own(topology, flat.send_matrix() * row_bytes, rank)[0]
    rows = float(stats.plan.rows_per_rank()[rank]), float(flat.rows_per_rank()[rank])
    inside = sum(stats.exchange.tensor_bytes or (0, 0))
    return np.array([*bytes_by_level, back_out / row_bytes, flat_out, *rows, inside])


def _own(topology: Topology, sent_RR: np.ndarray, rank: int) -> np.ndarray:
    """Bytes that a rank sends, by level."""
    only = np.zeros_like(sent_RR)
    only[rank] = sent_RR[rank]
    found = topology.bytes_by_level(only)
    return np.array([found[level.name] for level in topology.levels], float)


def figures(of_ranks: np.ndarray, topology: Topology, between_nodes: bool) -> dict[str, Any]:
    """Exact sums over ranks from their `own_figures`, and ceilings against plain expert parallelism.

    between_nodes: whether an expert group has ranks on several nodes (its outermost level is then between them).
    predicted_ceiling: the most that time can fall by, if only bytes between nodes cost (rows of the busiest rank,
    where there is one node).
    """
    total, busiest = of_ranks.sum(0), of_ranks.max(0)
    depth = topology.depth
    bytes_per_level = {level.name: int(total[i]) for i, level in enumerate(topology.levels)}
    bytes_per_level |= {"tensor": int(total[depth + 4])} if total[depth + 4] else {}
    bytes_ceiling = total[depth + 1] / max(1.0, total[0])
    rows_ceiling = busiest[depth + 3] / max(1.0, busiest[depth + 2])
    return {
        "bytes_per_level": bytes_per_level,
        "rows_crossing_nodes": int(total[depth]) if between_nodes else 0,
        "predicted_ceiling": round(float(bytes_ceiling if between_nodes else rows_ceiling), 3),
        "busiest_rank_rows": int(busiest[depth + 2]),
        "rows_ceiling": round(float(rows_ceiling), 3),
    }


def predicted_seconds(stats: LayerStats, topology: Topology, tensor: Topology | None = None) -> float:
    """Dispatch and combine by the lines of the topology, each stage bounded by the rank that sends or receives most.

    (HierMoE's parts x largest block is the same where blocks are alike, and more where few rows make them unlike.)
    Metadata that travels apart from rows is in the bytes; its latency counts as another alpha. tensor: of a tensor
    group, whose gathers and scatters count like all-to-alls of what they hand out.
    """
    depth, total = len(stats.exchange.traffic), 0.0
    for number, traffic in enumerate(stats.exchange.traffic, 1):
        link = topology.link(number, depth)
        total += link.seconds(_busiest(traffic.sent)) + (link.alpha if traffic.rows is not None else 0.0)
        total += link.seconds(_busiest(traffic.returned))
    return total + _inside(stats.exchange.tensor_bytes, tensor)


def _inside(sent: tuple[int, int] | None, tensor: Topology | None) -> float:
    """An all-gather in dispatch, a reduce-scatter (taken for as long as the gather of its result) and an all-gather in
    combine; or one all-reduce. Where they were not measured, like an all-to-all of what they hand out."""
    if sent is None or tensor is None or tensor.ranks == 1:
        return 0.0
    level, others = tensor.levels[0], tensor.ranks - 1
    gather, reduce = level.collective("all_gather"), level.collective("all_reduce")
    if sent[0] and gather is not None:
        return gather.seconds(sum(sent) / others) + 2 * gather.alpha
    if not sent[0] and reduce is not None:
        return reduce.seconds(sent[1] * tensor.ranks / (2 * others))
    return level.within.seconds(sum(sent) * tensor.ranks / others) + level.within.alpha * (1 + (sent[0] > 0))


def _busiest(sent_RR: np.ndarray) -> float:
    return float(max(sent_RR.sum(0).max(initial=0), sent_RR.sum(1).max(initial=0)))
