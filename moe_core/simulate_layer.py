"""One MoE layer of one expert group under one way of running it: its plan made by the real planner, then priced.

Overlap follows the code: weights that travel leave with the rows and share their link; a rank computes rows of its own
experts before it waits for borrowed ones; `overlap_chunks` hides exchanges under compute.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from .config import Config
from .mesh import Mesh
from .placement import exchanged
from .plan import SHARDS, Plan
from .planners.budget import LayerShape, RoundRule
from .planners.swap import best_swap, demand_of
from .planning import Planner, make_planner
from .simulate_exchange import (
    Load,
    Passes,
    Route,
    RowSize,
    all_to_all_seconds,
    passes,
    tensor_bytes,
    traffic,
)
from .simulate_rates import Rates
from .swapping import SwapPolicy, swap_policy
from .topology import Link, Topology, topology_of
from .transport.base import Traffic


@dataclass(frozen=True)
class Site:
    """Where a layer runs: the hierarchy of its expert group, links of its tensor group, rates, bytes of elements."""

    topology: Topology
    tensor: Link
    rates: Rates
    shape: LayerShape
    node_of: tuple[int, ...] | None


@dataclass(frozen=True)
class LayerCost:
    """seconds: by part, forward and backward apart; the other figures are of the exchange and the busiest rank.

    bytes_per_level: dispatch and combine of the group; rows: computed by each rank; held_bytes: weights that a rank
    has at hand besides its own parameters; between_units: rows that leave their unit of the outermost level.
    """

    seconds: dict[str, float]
    bytes_per_level: dict[str, int]
    rows_R: np.ndarray
    between_units: int
    held_bytes: int
    depth: int
    rounds: int

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def ratio(self) -> float:
        """Straggler: rows of the busiest rank over the mean."""
        return float(self.rows_R.max() / max(self.rows_R.mean(), 1e-30))


def site_of(config: Config, mesh: Mesh, rates: Rates, shape: LayerShape) -> Site:
    """The place of one layer on a mesh, from the config's cluster."""
    topology = topology_of(config.cluster, mesh.partition("expert"))
    tensor = topology_of(config.cluster, mesh.partition("tensor")).levels[0].within if mesh.tensor > 1 else Link()
    node_of = tuple(topology.unit_of(1).tolist()) if topology.depth > 1 else None
    whole = rates.of(shape)
    if mesh.tensor > 1:
        whole = replace(
            whole, forward=whole.forward.scaled(1 / mesh.tensor), backward=whole.backward.scaled(1 / mesh.tensor)
        )
    return Site(topology, tensor, whole, shape, node_of)


@dataclass
class LayerRun:
    """One layer through steps: planners remember, experts swap between steps."""

    config: Config
    site: Site
    planner: Planner = field(init=False)
    swaps: int = 0
    _policy: SwapPolicy | None = None

    def __post_init__(self) -> None:
        moe, parallel, ranks = self.config.moe, self.config.parallel, self.site.topology.ranks
        self.planner = make_planner(moe, parallel, ranks, self.site.node_of)
        if parallel.placement == "swap" and ranks > 1:
            depth = self._route().depth or self.site.topology.depth
            depth = depth if parallel.transport == "hierarchical_dedup" else 1
            expert = 3 * 4 * self.site.shape.expert_bytes // self.site.shape.bytes_per_element
            self._policy = swap_policy(parallel.swap, self.site.topology, depth, self.site.shape.row_bytes, expert)

    def plan(self, load: Load) -> Plan:
        """The plan of one call, which the planner remembers."""
        return self.planner.plan(load.counts_RE, True)

    def swap(self, load: Load) -> bool:
        """After a step: move the best pair of experts, judged on the sampled tokens. Whether one moved."""
        if self._policy is None:
            return False
        owned_RC = self.planner.owned_RC  # type: ignore[attr-defined]
        rank_E = np.empty(load.counts_RE.shape[1], np.int64)
        rank, column = np.nonzero(owned_RC >= 0)
        rank_E[owned_RC[rank, column]] = rank
        chosen_TE = np.zeros((len(load.ids_SK), len(rank_E)), np.int64)
        token, place = np.nonzero(load.ids_SK >= 0)
        chosen_TE[token, load.ids_SK[token, place]] = 1
        demand = demand_of(chosen_TE, rank_E, self.site.topology.ranks, self._policy.units)
        scale = load.counts_RE.sum() / max(1, chosen_TE.sum())
        objective = self._policy.objective
        scaled = replace(
            objective,
            seconds_per_token=tuple(scale * s for s in objective.seconds_per_token),
            seconds_per_row=scale * objective.seconds_per_row,
        )
        found = best_swap(demand, scaled, self.site.topology.ranks, self._policy.threshold)
        if found is None:
            return False
        self.planner.owned_RC = exchanged(owned_RC, found.first, found.second)  # type: ignore[attr-defined]
        self.swaps += 1
        return True

    def cost(self, load: Load, plan: Plan) -> LayerCost:
        """Seconds and bytes of one call, forward and backward."""
        parallel, site = self.config.parallel, self.site
        size = RowSize(site.shape.hidden_size, site.shape.bytes_per_element)
        route = self._route(int(load.counts_RE.sum()) // max(1, load.top_k * plan.ranks))
        moved = traffic(plan, load, route, site.topology, size) if plan.ranks > 1 else ()
        exchange = passes(moved, site.topology, size.weight != size.element) if moved else Passes(0, 0, 0, 0)
        lent = _weights_moved(plan, site.shape)
        weights = all_to_all_seconds(lent, site.topology, 1, 1) if lent.any() else 0.0
        rule = RoundRule(parallel.max_rows_per_rank, "chunk", parallel.overlap_chunks)
        rounds = rule.apply(plan).rounds if rule.exceeded(plan) else 1
        seconds = self._forward_backward(plan, exchange, weights, rounds)
        seconds |= self._inside_tensor_group(moved, load, size)
        seconds["copies"] = self._copied(plan, moved, lent) * site.rates.per_byte
        return LayerCost(
            seconds=seconds,
            bytes_per_level=_bytes_per_level(moved, site.topology, lent),
            rows_R=plan.rows_per_rank(),
            between_units=_between_units(moved, site.topology, size.row),
            held_bytes=_held(plan, site.shape),
            depth=len(moved),
            rounds=rounds,
        )

    def _route(self, tokens: int = 4096) -> Route:
        p, depth = self.config.parallel, None
        if p.hierarchy_depth != "auto":
            depth = min(p.hierarchy_depth, self.site.topology.depth)
        parts = p.tensor_parallel_size
        return Route(p.transport, depth, p.deduplicate, parts, self.config.moe.num_experts, tokens)

    def _forward_backward(self, plan: Plan, x: Passes, weights: float, rounds: int) -> dict[str, float]:
        """By part. In several rounds every round is computed again in backward; latencies count once per round."""
        p, rates = self.config.parallel, self.site.rates
        computed = _Compute.of(plan, rates)
        latency = self.site.topology.levels[0].within.alpha if plan.ranks > 1 else 0.0
        chunks = p.overlap_chunks if rounds == 1 else 1
        again = self.config.train.recompute
        arrive, ready = min(2 * x.dispatch, x.dispatch + weights), x.dispatch + weights
        sharded = bool((plan.weight_from == SHARDS).any())
        own_done = (ready if sharded else arrive) + computed.own_R
        done = np.where(computed.lent_R > 0, np.maximum(own_done, ready), own_done) + computed.lent_R
        forward = float(done.max())
        hidden = _hidden(chunks, x.dispatch + x.combine, computed.most, latency)
        hidden_back = _hidden(chunks, x.combine_back + x.dispatch_back, float(computed.back_R.max()), latency)
        seconds = {
            "plan": latency * (2 if p.transport == "hierarchical_dedup" and p.deduplicate else 1),
            "dispatch": x.dispatch,
            "weights": max(0.0, forward - x.dispatch - computed.most) if weights else 0.0,
            "compute": computed.most,
            "combine": x.combine,
            "backward_exchanges": x.combine_back + x.dispatch_back,
            "backward_compute": float(computed.back_R.max()),
            "backward_weights": weights,
            "overlapped": -hidden - hidden_back,
        }
        if rounds > 1 or again == "layer":
            seconds["recompute"] = forward + x.combine + 2 * (rounds - 1) * latency
        elif again == "experts":
            seconds["recompute"] = seconds["compute"] + weights
        return seconds

    def _copied(self, plan: Plan, moved: tuple[Traffic, ...], lent_RR: np.ndarray) -> float:
        """Bytes that the busiest rank rearranges on itself, forward and backward: rows before they leave and where they
        arrive, results before they return; stages of a hierarchy once more each; gathered or lent weights three times
        forward and four times backward (packed, cut, stacked, and gradients added up)."""
        if not moved:
            return 0.0
        rows = float(max(t.sent.sum(1).max() + t.sent.sum(0).max() for t in moved))
        computed = float(plan.rows_per_rank().max()) * self.site.shape.row_bytes
        weights = float(max(lent_RR.sum(0).max(), lent_RR.sum(1).max()))
        return 2 * (len(moved) * rows + computed) + 7 * weights

    def _inside_tensor_group(self, moved: tuple[Traffic, ...], load: Load, size: RowSize) -> dict[str, float]:
        """All-gathers and reduce-scatters of a group-wise exchange, or the sum of split experts' parts; and back."""
        p, link = self.config.parallel, self.site.tensor
        if p.tensor_parallel_size == 1:
            return {}
        t = p.tensor_parallel_size
        if p.transport == "groupwise" and moved:
            gathered = tensor_bytes(moved, t) * t / (t - 1)
            return {"tensor": 2 * (3 * link.alpha + link.beta * gathered)}
        tokens = int(load.counts_RE.sum(1).max()) / max(1, load.top_k)
        return {"tensor": 2 * 2 * link.seconds(tokens * size.row)}


@dataclass(frozen=True, eq=False)
class _Compute:
    """Seconds per rank: forward of own and of lent experts, backward of both."""

    own_R: np.ndarray
    lent_R: np.ndarray
    back_R: np.ndarray

    @property
    def most(self) -> float:
        """Forward of the busiest rank."""
        return float((self.own_R + self.lent_R).max())

    @classmethod
    def of(cls, plan: Plan, rates: Rates) -> _Compute:
        rows_RC = plan.flow.sum(0).reshape(plan.ranks, -1)
        lent = plan.weight_from >= 0
        held = plan.slots >= 0
        own = rates.forward.seconds((rows_RC * ~lent).sum(1), (held & ~lent).sum(1))
        many = lent.sum(1)
        other = rates.forward.seconds((rows_RC * lent).sum(1), many) - rates.forward.fixed
        back = rates.backward.seconds(rows_RC.sum(1), held.sum(1))
        return cls(own, np.where(many > 0, other, 0.0), back)


def _hidden(chunks: int, exchanges: float, compute: float, latency: float) -> float:
    """Seconds saved by running exchanges of one chunk under the compute of another, its extra latencies paid."""
    if chunks == 1:
        return 0.0
    return (1 - 1 / chunks) * min(exchanges, compute) - 2 * (chunks - 1) * latency


def _weights_moved(plan: Plan, shape: LayerShape) -> np.ndarray:
    """(R, R) bytes of expert weights from rank to rank in one call (own shards included, as an all-to-all counts)."""
    ranks, width = plan.slots.shape
    if (plan.weight_from == SHARDS).any():
        return np.full((ranks, ranks), width * -(-shape.expert_bytes // ranks), np.int64)
    moved = np.zeros((ranks, ranks), np.int64)
    borrower, column = np.nonzero(plan.weight_from >= 0)
    np.add.at(moved, (plan.weight_from[borrower, column], borrower), shape.expert_bytes)
    return moved


def _held(plan: Plan, shape: LayerShape) -> int:
    """Bytes of gathered or borrowed weights on the rank that has most of them."""
    if (plan.weight_from == SHARDS).any():
        return plan.slots_per_rank * shape.expert_bytes
    return int((plan.weight_from >= 0).sum(1).max(initial=0)) * shape.expert_bytes


def _bytes_per_level(moved: tuple[Traffic, ...], topology: Topology, lent_RR: np.ndarray) -> dict[str, int]:
    found = dict.fromkeys((level.name for level in topology.levels), 0)
    for matrix in [t.sent if t.rows is None else t.sent + t.rows for t in moved]:
        for level, sent in topology.bytes_by_level(matrix).items():
            found[level] += sent
    if all(t.rows is None for t in moved):
        found = {level: 2 * sent for level, sent in found.items()}
    if lent_RR.any():
        found["weights"] = int(lent_RR.sum() - np.trace(lent_RR))
    return found


def _between_units(moved: tuple[Traffic, ...], topology: Topology, row_bytes: int) -> int:
    if topology.depth == 1:
        return 0
    return sum(topology.bytes_by_level(t.returned)[topology.levels[0].name] for t in moved) // row_bytes
