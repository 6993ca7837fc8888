"""What a layout would cost, exactly: LAER's model with a latency per message (arXiv 2602.11686, as released)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np

EXCHANGES = 4
"""Dispatch and combine, forward and backward."""


@dataclass(frozen=True)
class CostModel:
    """Seconds, as fractions. near: within a node; far: between nodes; same rank: free.

    row_near, row_far: per row moved; message_near, message_far: per pair of ranks that exchange rows;
    row_compute: forward of one row through an expert; recompute: one forward more. comm `max` takes the busiest
    source, `sum` all sources (as released).
    """

    row_near: Fraction = Fraction("3.7879e-8")
    row_far: Fraction = Fraction("9.2093e-8")
    row_compute: Fraction = Fraction("1.484375e-6")
    message_near: Fraction = Fraction(0)
    message_far: Fraction = Fraction(0)
    recompute: bool = True
    comm: Literal["max", "sum"] = "max"

    @classmethod
    def measured(
        cls, row_bytes: int, near_bytes_per_s: int, far_bytes_per_s: int, row_compute: Fraction, recompute: bool = True
    ) -> CostModel:
        """From link rates and a measured compute time per row; latencies are added with `dataclasses.replace`."""
        near, far = Fraction(row_bytes, near_bytes_per_s), Fraction(row_bytes, far_bytes_per_s)
        return cls(near, far, row_compute, recompute=recompute)


@dataclass(frozen=True)
class Cost:
    """Seconds: communication over the exchanges of a step, compute of the busiest rank, their sum."""

    comm: Fraction
    compute: Fraction

    @property
    def total(self) -> Fraction:
        return self.comm + self.compute


def cost_of(send_RR: np.ndarray, node_R: np.ndarray, model: CostModel) -> Cost:
    """T = 4 x comm + (3 + recompute) x compute of rows sent from each rank (row) to each rank (column)."""
    far = node_R[:, None] != node_R[None]
    off_rank = ~np.eye(len(send_RR), dtype=bool)
    near = ~far & off_rank
    rates = (model.row_near, model.row_far, model.message_near, model.message_far)
    unit = math.lcm(*(r.denominator for r in rates))
    weights = [int(r * unit) for r in rates]
    sent = (send_RR * near, send_RR * far, (send_RR > 0) & near, (send_RR > 0) & far)
    amounts = zip(*(a.sum(1).tolist() for a in sent))
    sources = [sum(w * a for w, a in zip(weights, row)) for row in amounts]
    comm = max(sources) if model.comm == "max" else sum(sources)
    busiest = int(send_RR.sum(0).max())
    return Cost(Fraction(EXCHANGES * comm, unit), (3 + model.recompute) * busiest * model.row_compute)
