"""LLEP: what exceeds a rank's share of the rows spills, expert by expert, to the least loaded ranks.

Source: Least-Loaded Expert Parallelism, arXiv 2601.17111, section 4 and Alg. 2-4. A plan is made from the counts
of the very call it serves; every rank makes the same one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

import numpy as np

from ..plan import SHARDS, Plan
from .assemble import Segments, build, cut, owner_of, source_first
from .rationals import ceil_ratio, imbalance, node_array
from .static import plan_static

UNLIMITED = np.iinfo(np.int64).max


@dataclass(frozen=True)
class LeastLoadedOptions:
    """Parameters of LLEP, exact so that all ranks agree. ValueError where they contradict each other.

    alpha: a rank's share is ceil(alpha x rows / ranks). lambda_: below this max / mean over ranks the static plan
    is used; None = never. min_rows: smallest piece worth a GEMM and a weight transfer; min_rows_far: the same
    between nodes (None = min_rows). small_remainder: `prose` leaves what is smaller with the owner (the paper's
    text), `pseudocode` hands it to helpers (its Alg. 3; not with max_borrowed). spill_order: `global` cuts an
    expert's rows in order of their source (published), `source_first` gives each rank its own rows first.
    node_of: node of each rank. max_borrowed: foreign experts that a rank may hold. max_rows_per_rank: lowers the
    share, not below ceil(rows / ranks), and plans whenever the static plan would exceed it.
    """

    alpha: Fraction = Fraction(1)
    lambda_: Fraction | None = Fraction(13, 10)
    min_rows: int = 1024
    min_rows_far: int | None = None
    small_remainder: Literal["prose", "pseudocode"] = "prose"
    spill_order: Literal["global", "source_first"] = "global"
    node_of: tuple[int, ...] | None = None
    max_borrowed: int | None = None
    max_rows_per_rank: int | None = None

    def __post_init__(self) -> None:
        if self.alpha < 1:
            raise ValueError(f"alpha={self.alpha} leaves rows without a place; choose alpha >= 1")
        if self.lambda_ is not None and self.lambda_ < self.alpha:
            raise ValueError(
                f"lambda={self.lambda_} < alpha={self.alpha} would make plans that move nothing; "
                "choose lambda >= alpha, or null to plan always"
            )
        if self.min_rows < 1 or (self.min_rows_far or 1) < 1:
            raise ValueError("min_rows must be at least 1; choose 1 to allow pieces of any size")


def share_of_rank(total: int, ranks: int, options: LeastLoadedOptions) -> int:
    """cap = ceil(alpha T / P): rows above which a rank hands over."""
    cap = ceil_ratio(options.alpha, total, ranks)
    if options.max_rows_per_rank is None:
        return cap
    return max(ceil_ratio(Fraction(1), total, ranks), min(cap, options.max_rows_per_rank))


def is_balanced(counts_RE: np.ndarray, owner_E: np.ndarray, options: LeastLoadedOptions) -> bool:
    """Whether plain expert parallelism serves: max / mean of the ranks' own rows < lambda, and within the budget."""
    native_R = np.bincount(owner_E, counts_RE.sum(0), len(counts_RE)).astype(np.int64)
    over = options.max_rows_per_rank is not None and int(native_R.max()) > options.max_rows_per_rank
    return not over and options.lambda_ is not None and imbalance(native_R) < options.lambda_


def plan_least_loaded(counts_RE: np.ndarray, owned_RC: np.ndarray, options: LeastLoadedOptions) -> Plan:
    """The plan of one call for weights borrowed from their owners.

    counts_RE (R, E): rows of each expert on each source. owned_RC (R, M): experts of each rank, -1 padding last
    (`static.slot_table`). Owned experts keep their slots, with or without rows; borrowed ones follow by expert id.
    With min_rows = 1 and no max_borrowed no rank gets more than its share.
    """
    owner_E = owner_of(owned_RC, counts_RE.shape[1])
    if is_balanced(counts_RE, owner_E, options):
        return plan_static(counts_RE, owned_RC)
    limit_R = np.full(len(owned_RC), UNLIMITED if options.max_borrowed is None else options.max_borrowed, np.int64)
    segments = spill_segments(counts_RE, owner_E, limit_R, options, spread=False)
    return build(segments, _flow(counts_RE, segments, options), owned_RC)


def plan_least_loaded_sharded(
    counts_RE: np.ndarray, home_RC: np.ndarray, slots_per_rank: int, options: LeastLoadedOptions
) -> Plan:
    """The plan of one call for fully sharded experts: C = slots_per_rank is fixed, weights come from the shards.

    home_RC (R, M): where each expert is always unsharded, as owned_RC above; the other C - M slots take spilled
    experts. What finds no slot is levelled over the ranks that hold its expert. ValueError if C < M.
    """
    held_R = (home_RC >= 0).sum(1)
    if slots_per_rank < home_RC.shape[1]:
        raise ValueError(
            f"{slots_per_rank} slots per rank cannot hold the {home_RC.shape[1]} experts at home there; "
            f"choose at least {home_RC.shape[1]}"
        )
    owner_E = owner_of(home_RC, counts_RE.shape[1])
    most = UNLIMITED if options.max_borrowed is None else options.max_borrowed
    limit_R = np.zeros_like(held_R) if is_balanced(counts_RE, owner_E, options) else slots_per_rank - held_R
    segments = spill_segments(counts_RE, owner_E, np.minimum(limit_R, most), options, spread=True)
    plan = build(segments, _flow(counts_RE, segments, options), home_RC, slots_per_rank)
    return replace(plan, weight_from=np.where(plan.slots >= 0, SHARDS, plan.weight_from))


def spill_segments(
    counts_RE: np.ndarray, owner_E: np.ndarray, limit_R: np.ndarray, options: LeastLoadedOptions, spread: bool
) -> Segments:
    """Pieces of each expert. Experts are placed from the most to the least loaded, ties by id."""
    from .spill import SpillRule, assign

    load_E = counts_RE.sum(0)
    rule = SpillRule(
        cap=share_of_rank(int(load_E.sum()), len(counts_RE), options),
        near=options.min_rows,
        far=options.min_rows_far or options.min_rows,
        finish=options.small_remainder == "pseudocode",
        force=options.small_remainder == "pseudocode" and options.max_borrowed is None and not spread,
        spread=spread,
    )
    visit_E = np.argsort(-load_E, kind="stable")
    tables = assign(load_E, owner_E, visit_E, node_array(options.node_of, len(counts_RE)), limit_R, rule)
    return Segments.of(*tables, owner_E)


def _flow(counts_RE: np.ndarray, segments: Segments, options: LeastLoadedOptions) -> np.ndarray:
    if options.spill_order == "source_first":
        return source_first(counts_RE, segments, node_array(options.node_of, len(counts_RE)))
    return cut(counts_RE, segments.expert, segments.rows)
