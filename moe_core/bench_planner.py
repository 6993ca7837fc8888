"""`twinmoe bench planner`: how long planning takes on this machine.

Compilation is left out: each case runs before it is timed. Least-loaded plans are timed at their hardest, with
pieces of any size and no test for balance.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .planners.layout import tiled_layout
from .planners.least_loaded import LeastLoadedOptions, plan_least_loaded
from .planners.relayout import RelayoutOptions, plan_relayout, solve
from .planners.static import owners, slot_table

PUBLISHED_MS = {64: 1.75, 256: 17.4, 1024: 282.0}
"""LAER's own search, 32 experts, 16 slots per rank, by ranks (arXiv 2602.11686, fig. 11, artifact data)."""


@dataclass(frozen=True)
class Case:
    """One line. planner: `least_loaded` (counts to Plan), `relayout` (LAER's search, beside the step), or
    `relayout_plan` (counts and a layout to Plan, on the step's path). slots: C of LAER."""

    planner: str
    num_experts: int
    ranks: int
    slots: int = 0
    spill_order: Literal["global", "source_first"] = "global"


CASES = (
    *(Case("least_loaded", 256, ranks) for ranks in (16, 64, 256)),
    Case("least_loaded", 256, 64, spill_order="source_first"),
    *(Case("relayout", 32, ranks, 16) for ranks in PUBLISHED_MS),
    *(Case("relayout_plan", 32, ranks, 16) for ranks in PUBLISHED_MS),
)


def run(cases: Sequence[Case] = CASES, repeats: int = 15, seed: int = 0) -> dict[str, Any]:
    """Medians in milliseconds.

    Returns {rows: [{planner, num_experts, ranks, slots, milliseconds, spill_order, published_milliseconds}],
    growth: {planner: exponent of the number of ranks}, compiled, compile_excluded}.
    """
    from .planners.compiled import COMPILED

    rows = [_measure(case, repeats, seed) for case in cases]
    names = list(dict.fromkeys(case.planner for case in cases))
    growth = {name: _exponent([row for row in rows if row["planner"] == name]) for name in names}
    return {"rows": rows, "growth": growth, "compiled": COMPILED, "compile_excluded": True}


def skewed(num_experts: int, ranks: int, seed: int = 0, copies_per_rank: int = 32768) -> np.ndarray:
    """(R, E) counts of strong skew: the n-th expert in a random order has a share as 1 / n; sampled per source."""
    rng = np.random.default_rng(seed)
    share_E = rng.permutation(1.0 / np.arange(1, num_experts + 1))
    return rng.multinomial(copies_per_rank, share_E / share_E.sum(), ranks).astype(np.int64)


def _measure(case: Case, repeats: int, seed: int) -> dict[str, Any]:
    call = _call(case, skewed(case.num_experts, case.ranks, seed))
    slots = case.slots or call().slots.shape[1]
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    published = (
        PUBLISHED_MS.get(case.ranks) if (case.planner, case.num_experts, slots) == ("relayout", 32, 16) else None
    )
    return {
        "planner": case.planner,
        "num_experts": case.num_experts,
        "ranks": case.ranks,
        "slots": slots,
        "milliseconds": round(1e3 * statistics.median(times), 4),
        "spill_order": case.spill_order if case.planner == "least_loaded" else None,
        "published_milliseconds": published,
    }


def _call(case: Case, counts_RE: np.ndarray) -> Callable[[], Any]:
    ranks, num_experts = counts_RE.shape
    if case.planner == "least_loaded":
        owned_RC = slot_table(owners(num_experts, ranks), ranks)
        options = LeastLoadedOptions(lambda_=None, min_rows=1, spill_order=case.spill_order)
        return lambda: plan_least_loaded(counts_RE, owned_RC, options)
    options = RelayoutOptions(case.slots, node_of=tuple((np.arange(ranks) // 8).tolist()))
    first = tiled_layout(num_experts, ranks, case.slots)
    if case.planner == "relayout":
        return lambda: solve(counts_RE, first, options)
    layout = solve(counts_RE, first, options)
    return lambda: plan_relayout(counts_RE, layout, options)


def _exponent(rows: Sequence[dict[str, Any]]) -> float | None:
    """Slope of log time over log ranks; None with fewer than two numbers of ranks."""
    by_ranks = {row["ranks"]: row["milliseconds"] for row in reversed(rows)}
    if len(by_ranks) < 2:
        return None
    x, y = [math.log(r) for r in by_ranks], [math.log(ms) for ms in by_ranks.values()]
    return round(statistics.linear_regression(x, y).slope, 2)
