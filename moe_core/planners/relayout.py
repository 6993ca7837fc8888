"""LAER: a layout of replicas from the counts of past calls, used at a fixed lag (arXiv 2602.11686, as released).

The parts that the release leaves to chance are fixed here: the layout made after call s serves exactly call
s + lag, ties are broken by id, and remainders rotate.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise

import numpy as np

from ..plan import RESIDENT, SHARDS, Plan
from .assemble import Segments, build, owner_of
from .cost import Cost, CostModel, cost_of
from .layout import Layout, check_slots
from .lite_routing import SlotIndex, route
from .rationals import imbalance, node_array


@dataclass(frozen=True)
class RelayoutOptions:
    """Parameters of LAER. ValueError for a window or lag below 1.

    slots_per_rank: C. node_of: node of each rank (None = one node). window: calls whose counts are summed;
    lag: calls between a layout's data and its use. hysteresis: a new layout must be cheaper by this part;
    skip_below: no search while max / mean rows per rank is below. rotate: spread remainders. heap, even: which
    candidates are tried.
    """

    slots_per_rank: int
    node_of: tuple[int, ...] | None = None
    window: int = 5
    lag: int = 1
    hysteresis: Fraction = Fraction(2, 100)
    skip_below: Fraction = Fraction(105, 100)
    rotate: bool = True
    heap: bool = True
    even: bool = True
    cost: CostModel = field(default_factory=CostModel)

    def __post_init__(self) -> None:
        if self.window < 1 or self.lag < 1:
            raise ValueError(f"window={self.window} and lag={self.lag} must be at least 1 call")


def candidates(counts_RE: np.ndarray, options: RelayoutOptions) -> dict[str, Layout]:
    """The layouts that the search compares, by name: `heap` and, where slots divide by experts, `even`."""
    from .placement import even_replicas, heap_replicas, place

    ranks, num_experts = counts_RE.shape
    check_slots(num_experts, ranks, options.slots_per_rank)
    load_E, node_R = counts_RE.sum(0), node_array(options.node_of, ranks)
    num_slots = ranks * options.slots_per_rank
    vectors: dict[str, np.ndarray | None] = {}
    if options.heap:
        vectors["heap"] = heap_replicas(load_E, num_slots, len(np.unique(node_R)))
    if options.even:
        vectors["even"] = even_replicas(num_experts, num_slots)
    return {
        name: Layout(place(load_E, vector, options.slots_per_rank, node_R))
        for name, vector in vectors.items()
        if vector is not None
    }


def send_matrix(counts_RE: np.ndarray, layout: Layout, options: RelayoutOptions) -> np.ndarray:
    """(R, R) rows from each source to each computing rank under a layout."""
    ranks, num_experts = counts_RE.shape
    index = SlotIndex.of(layout, num_experts, node_array(options.node_of, ranks))
    rank_of_slot = np.arange(layout.slots.size) // layout.slots.shape[1]
    return route(counts_RE, index, rank_of_slot, ranks, options.rotate)


def layout_cost(counts_RE: np.ndarray, layout: Layout, options: RelayoutOptions) -> Cost:
    """Modelled seconds of a layout for these counts."""
    return cost_of(send_matrix(counts_RE, layout, options), node_array(options.node_of, len(counts_RE)), options.cost)


def solve(counts_RE: np.ndarray, current: Layout, options: RelayoutOptions) -> Layout:
    """The layout to use next: the cheapest candidate, or the current one unless the gain exceeds the hysteresis.

    Also the current one, without a search, while it is balanced (skip_below) on these counts.
    """
    node_R = node_array(options.node_of, len(counts_RE))
    send_RR = send_matrix(counts_RE, current, options)
    if imbalance(send_RR.sum(0)) < options.skip_below:
        return current
    found = [
        (layout_cost(counts_RE, layout, options).total, layout) for layout in candidates(counts_RE, options).values()
    ]
    if not found:
        return current
    total, best = min(found, key=lambda pair: pair[0])
    worth = total < cost_of(send_RR, node_R, options.cost).total * (1 - options.hysteresis)
    return best if worth else current


def plan_relayout(
    counts_RE: np.ndarray, layout: Layout, options: RelayoutOptions, owned_RC: np.ndarray | None = None
) -> Plan:
    """The plan of one call under a layout, every weight gathered from the shards.

    Replicas of an expert on one rank become one slot, the first, with the rows of all; the others stay empty.
    owned_RC: instead borrow weights from owners (`as_borrowed`). ValueError if an expert has no slot.
    """
    ranks, num_experts = counts_RE.shape
    slots_RC, target_S = _merge_replicas(layout.slots)
    index = SlotIndex.of(layout, num_experts, node_array(options.node_of, ranks))
    flat = slots_RC.reshape(-1)
    held = np.flatnonzero(flat >= 0)
    by_expert = held[np.argsort(flat[held], kind="stable")]
    bounds = np.searchsorted(flat[by_expert], np.arange(num_experts + 1)).tolist()
    plan = Plan(
        slots=slots_RC,
        weight_from=np.where(slots_RC >= 0, SHARDS, RESIDENT),
        order=tuple(by_expert[a:b] for a, b in pairwise(bounds)),
        flow=route(counts_RE, index, target_S, flat.size, options.rotate),
        round=np.zeros(flat.size, np.int64),
    )
    return plan if owned_RC is None else as_borrowed(plan, owned_RC)


def slots_of(layout: Layout) -> np.ndarray:
    """(R, C) slots of any call's plan under a layout whose weights come from the shards."""
    return _merge_replicas(layout.slots)[0]


def _merge_replicas(slots_RC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(table without repeats on a rank, slot that takes over the rows of each slot)."""
    ranks, width = slots_RC.shape
    same = slots_RC[:, :, None] == slots_RC[:, None, :]
    first = same.argmax(2)
    repeated = first != np.arange(width)
    target = np.arange(ranks)[:, None] * width + first
    return np.where(repeated, -1, slots_RC), target.reshape(-1)


def as_borrowed(plan: Plan, owned_RC: np.ndarray) -> Plan:
    """The same rows on the same ranks with weights lent by owners instead of gathered from shards.

    Owned experts take their own slots, first in `order`, with or without rows; other experts that the plan puts on
    a rank follow by id. `plan` holds an expert at most once per rank.
    """
    owner_E = owner_of(owned_RC, len(plan.order))
    table = np.zeros((len(plan.order), plan.ranks), np.int64)
    turn = np.zeros_like(table)
    for e, order in enumerate(plan.order):
        rank = order // plan.slots_per_rank
        table[e, rank] = plan.flow[:, order].sum(0)
        turn[e, rank] = np.where(rank == owner_E[e], 0, np.arange(1, len(rank) + 1))
    segments = Segments.of(table, turn, owner_E)
    slot_of = {(int(e), int(s) // plan.slots_per_rank): int(s) for e, order in enumerate(plan.order) for s in order}
    flow = np.zeros((plan.ranks, len(segments.expert)), np.int64)
    for g, key in enumerate(zip(segments.expert.tolist(), segments.rank.tolist())):
        if key in slot_of:
            flow[:, g] = plan.flow[:, slot_of[key]]
    return build(segments, flow, owned_RC)


@dataclass(frozen=True, eq=False)
class Problem:
    """What a search needs: summed counts (R, E), and the layout that served the last of those calls."""

    counts: np.ndarray
    current: Layout


@dataclass(frozen=True, eq=False)
class RelayoutState:
    """Memory of one layer between calls: plain arrays, for checkpoints too.

    call: calls seen. window (W, R, E): their last counts, oldest first. layouts (L, R, C): for calls `call`,
    `call + 1`, ...; L = lag between calls, one fewer while a search runs.
    """

    call: int
    window: np.ndarray
    layouts: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """For a checkpoint; save when every search has been delivered."""
        return {"call": np.array(self.call, np.int64), "window": self.window, "layouts": self.layouts}

    @classmethod
    def of_arrays(cls, arrays: dict[str, np.ndarray]) -> RelayoutState:
        """The state that `arrays` described."""
        return cls(int(arrays["call"]), arrays["window"], arrays["layouts"])


def start(initial: Layout, num_experts: int, options: RelayoutOptions) -> RelayoutState:
    """Before the first call: `initial` serves the first `lag` calls."""
    initial.multiplicity(num_experts)
    window = np.zeros((0, len(initial.slots), num_experts), np.int64)
    return RelayoutState(0, window, np.repeat(initial.slots[None], options.lag, axis=0))


def next_layout(state: RelayoutState) -> Layout:
    """The layout of the coming call. RuntimeError if its search was not delivered yet: wait for it."""
    if not len(state.layouts):
        raise RuntimeError(f"the layout of call {state.call} is still being searched; deliver it before the call")
    return Layout(state.layouts[0])


def observe(state: RelayoutState, counts_RE: np.ndarray, options: RelayoutOptions) -> tuple[RelayoutState, Problem]:
    """After a call (not its recomputation): the state without the layout just used, and the search to run."""
    window = np.concatenate([state.window, counts_RE[None]])[-options.window :]
    seen = RelayoutState(state.call + 1, window, state.layouts[1:])
    return seen, Problem(window.sum(0), next_layout(state))


def deliver(state: RelayoutState, layout: Layout) -> RelayoutState:
    """Append a search's result; results arrive in the order of their calls."""
    return replace(state, layouts=np.concatenate([state.layouts, layout.slots[None]]))


def advance(state: RelayoutState, counts_RE: np.ndarray, options: RelayoutOptions) -> RelayoutState:
    """`observe`, search here and now, `deliver`."""
    seen, problem = observe(state, counts_RE, options)
    return deliver(seen, solve(problem.counts, problem.current, options))
