"""Counts under skew, and what each scheme's plan makes of them: rows, bytes and memory without running a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np

from ..plan import Plan
from .budget import Forecast, LayerShape, forecast
from .layout import strided_layout, tiled_layout
from .least_loaded import LeastLoadedOptions, plan_least_loaded
from .rationals import imbalance
from .relayout import RelayoutOptions, plan_relayout, solve
from .static import owners, plan_static, slot_table

GPT_OSS_120B = LayerShape(num_experts=128, hidden_size=2880, expert_hidden_size=2880, top_k=4)
DEEPSEEK_V3 = LayerShape(num_experts=256, hidden_size=7168, expert_hidden_size=2048, top_k=8)


@dataclass(frozen=True)
class Skew:
    """`part` of all copies falls evenly on the first `hot` experts, the rest evenly on the others."""

    part: Fraction
    hot: int

    def distinct(self, top_k: int) -> bool:
        """Whether a router with distinct ids per token can do this: h experts draw at most h / K of the copies."""
        return self.hot >= top_k * self.part


def balanced(num_experts: int) -> Skew:
    """Every expert alike."""
    return Skew(Fraction(1), num_experts)


def skewed_counts(skew: Skew, num_experts: int, ranks: int, copies_per_rank: int) -> np.ndarray:
    """(R, E) counts, every source alike up to remainders, which start at another expert on each source."""
    hot = round(skew.part * copies_per_rank)
    counts_RE = np.zeros((ranks, num_experts), np.int64)
    for source in range(ranks):
        counts_RE[source, : skew.hot] = _even(hot, skew.hot, source)
        if skew.hot < num_experts:
            counts_RE[source, skew.hot :] = _even(copies_per_rank - hot, num_experts - skew.hot, source)
    return counts_RE


def _even(total: int, parts: int, turn: int) -> np.ndarray:
    share, extra = divmod(total, parts)
    return share + ((np.arange(parts) - turn * extra) % parts < extra)


@dataclass(frozen=True)
class SkewRun:
    """One table: a layer on virtual ranks. extra_slots: slots per rank that LAER has beyond E / R."""

    shape: LayerShape
    tokens_per_rank: int
    ranks: int = 8
    extra_slots: int = 4
    max_rows_per_rank: int | None = None
    least_loaded: LeastLoadedOptions = field(default_factory=LeastLoadedOptions)


def plans(counts_RE: np.ndarray, run: SkewRun) -> Iterator[tuple[str, Plan]]:
    """(name, plan): ep, llep with both spill orders, fsdp_ep, and laer with the layout of these very counts."""
    ranks, num_experts = counts_RE.shape
    owned_RC = slot_table(owners(num_experts, ranks), ranks)
    yield "ep", plan_static(counts_RE, owned_RC)
    published = replace(run.least_loaded, spill_order="global")
    yield "llep global", plan_least_loaded(counts_RE, owned_RC, published)
    local = replace(run.least_loaded, spill_order="source_first")
    yield "llep source_first", plan_least_loaded(counts_RE, owned_RC, local)
    share = owned_RC.shape[1]
    fixed = RelayoutOptions(slots_per_rank=share)
    yield "fsdp_ep", plan_relayout(counts_RE, strided_layout(num_experts, ranks, share), fixed)
    moving = RelayoutOptions(slots_per_rank=share + run.extra_slots)
    layout = solve(counts_RE, tiled_layout(num_experts, ranks, moving.slots_per_rank), moving)
    yield "laer", plan_relayout(counts_RE, layout, moving)


def skew_table(run: SkewRun, skews: Sequence[Skew]) -> list[dict[str, Any]]:
    """One row per skew and plan; figures are of the busiest rank unless they are called `crossing`.

    Keys: part, hot, distinct (False: no router with distinct ids does this), plan, rows, ratio (max / mean rows),
    crossing (share of rows that leave their rank), dispatch_bytes, weight_bytes, peak_bytes, rounds.
    """
    table: list[dict[str, Any]] = []
    for skew in skews:
        counts_RE = skewed_counts(skew, run.shape.num_experts, run.ranks, run.tokens_per_rank * run.shape.top_k)
        for name, plan in plans(counts_RE, run):
            need = forecast(plan, run.shape, run.max_rows_per_rank)
            head = {"part": float(skew.part), "hot": skew.hot, "distinct": skew.distinct(run.shape.top_k)}
            table.append({**head, "plan": name, **_figures(plan, need)})
    return table


def _figures(plan: Plan, need: Forecast) -> dict[str, Any]:
    send_RR = plan.send_matrix()
    total = max(1, int(send_RR.sum()))
    return {
        "rows": int(need.rows.max()),
        "ratio": round(float(imbalance(need.rows)), 3),
        "crossing": round(1 - int(np.trace(send_RR)) / total, 4),
        "dispatch_bytes": int(np.maximum(need.sent, need.received).max()),
        "weight_bytes": int(np.maximum(need.weights_sent, need.weights_received).max()),
        "peak_bytes": int(need.peak.max()),
        "rounds": need.rounds,
    }
