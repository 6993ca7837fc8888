"""One MoE layer. Read this file first: a token's path is five calls.

route     scores -> expert ids and weights
plan      counts -> who computes which rows with which weights (integers, on the host)
dispatch  rows to the ranks that compute them
compute   grouped feed-forward with the weights that are there
combine   rows back home, weighted and summed

Between plan and dispatch, weights that rest elsewhere set out (`gather`), unless they did so under the layer before
(`prefetch`). Two ways run the last three calls otherwise: `whole` in one operation, where nothing travels; `in_rounds`
several times, for a row budget or to overlap exchanges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..backends.protocol import Array, Communicator, Group, Ops
from .idle import with_padding, without_padding
from .plan import Plan
from .planners.budget import RoundRule, RowBudgetError
from .planning import Planner
from .prefetch import land, taken
from .residency.base import Residency
from .rounds import in_rounds
from .routing.base import Memo, Router, Routing, Tokens
from .transport.base import Exchange, Transport
from .whole import Whole


@dataclass(frozen=True)
class LayerStats:
    """What happened: chosen_E counts choices before dropping (device); plan is None where nothing travels.

    statistics: integer arrays by name, for `Router.update_state` once summed over micro-batches and ranks; nan_T:
    tokens whose router scores were not finite; bytes_sent: by level, what this rank sends besides the exchange;
    ids_TK: experts that were computed, -1 = none; figures: what the planner tells of this call, and its rounds.
    """

    chosen_E: Array
    kept_E: Array
    plan: Plan | None
    exchange: Exchange
    statistics: Mapping[str, Array] = field(default_factory=dict)
    nan_T: Array | None = None
    bytes_sent: Mapping[str, float] = field(default_factory=dict)
    ids_TK: Array | None = None
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class MoEOutput:
    """y in the shape of x; losses by name, before coefficients; stats."""

    y: Array
    losses: Mapping[str, Array]
    stats: LayerStats | None = field(default=None)


@dataclass(frozen=True)
class MoELayer:
    """The collaborators of one layer; the parameters are passed to `__call__` by their own short names.

    rounds: when rows travel and are computed in several rounds (`rounds.in_rounds`). whole: the last three calls in
    one, where this rank has all experts and the backend such an operation.
    """

    ops: Ops
    comm: Communicator
    group: Group
    num_experts: int
    router: Router
    planner: Planner
    transport: Transport
    residency: Residency
    shared: Callable[[Mapping[str, Array], Array], Array] | None = None
    checkpoint_experts: bool = False
    rounds: RoundRule = field(default_factory=RoundRule)
    whole: Whole | None = None

    def __call__(self, params: Mapping[str, Array], x_TD: Array, tokens: Tokens, memo: Memo) -> MoEOutput:
        if x_TD.shape[0] == 0:
            out = self(params, *with_padding(self.ops, x_TD, tokens), memo)
            return replace(out, y=without_padding(self.ops, out.y))
        routing = self.router.route(params, x_TD, tokens, memo)
        plan = self.plan(routing, tokens, memo)
        found = None if self.whole is None else self.whole(params, x_TD, routing)
        if found is not None:
            y_TD, exchange = found
        elif plan is not None and plan.rounds > 1:
            y_TD, exchange = in_rounds(self, (params, memo), x_TD, routing, plan)
        else:
            weights = self.gather(params, plan, memo)
            rows_ND, exchange = self.transport.dispatch(x_TD, routing, plan)
            if memo.ahead is not None:
                memo.ahead()
            out_ND = self.compute(weights, rows_ND, exchange, plan)
            y_TD = self.transport.combine(out_ND, routing.weights_TK, exchange)
        if self.shared is not None:
            y_TD = y_TD + self.shared(params, x_TD)
        return MoEOutput(y_TD, routing.losses, self._stats(routing, plan, exchange))

    def plan(self, routing: Routing, tokens: Tokens, memo: Memo) -> Plan | None:
        """The layer's one copy to the host: (ranks, experts) counts of kept rows. None in a group of one rank that
        has no row budget. RowBudgetError, on every rank and before a row has moved, for a plan over its budget."""
        if self.group.size == 1 and self.rounds.max_rows is None:
            return None

        def decide() -> Plan:
            counts_E = self.ops.count(routing.ids_TK, self.num_experts)
            return self.rounds.apply(self.planner.plan(self.comm.gather_to_host(counts_E, self.group), tokens.training))

        try:
            return memo.once("plan", decide)
        except RowBudgetError:
            land(self, memo)
            raise

    def gather(self, params: Mapping[str, Array], plan: Plan | None, memo: Memo) -> Any:
        """Weights that rest elsewhere set out while rows travel; those that are recomputed with the experts, later."""
        return params if self.checkpoint_experts else taken(self, params, plan, memo)

    def compute(self, weights: Any, rows_ND: Array, exchange: Exchange, plan: Plan | None) -> Array:
        """Expert outputs; under `train.recompute: experts` weights and intermediates come a second time in backward."""
        if not self.checkpoint_experts:
            return self.residency.compute(weights, rows_ND, exchange, plan)

        def again(rows_ND: Array) -> Array:
            return self.residency.compute(self.residency.gather(weights, plan), rows_ND, exchange, plan)

        return self.ops.checkpoint(again, rows_ND)

    def _stats(self, routing: Routing, plan: Plan | None, exchange: Exchange) -> LayerStats:
        chosen_E = self.ops.count(routing.chosen_TK, self.num_experts)
        same = routing.ids_TK is routing.chosen_TK
        kept_E = chosen_E if same else self.ops.count(routing.ids_TK, self.num_experts)
        statistics = {"chosen_E": chosen_E, "kept_E": kept_E, **routing.statistics}
        figures = {} if plan is None else {"rounds": float(plan.rounds), **self.planner.figures()}
        more = {"ids_TK": routing.ids_TK, "figures": figures}
        return LayerStats(chosen_E, kept_E, plan, exchange, statistics, routing.nan_T, **more)
