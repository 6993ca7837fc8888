"""One layer in training while the choice of experts drifts: losses, and where its parameters and moments lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from twinmoe.backends.protocol import Communicator, Component, Group, Launch, TrainOptions
from twinmoe.backends.registry import Backend
from twinmoe.moe_core.build import LayerSpec, build_layer, make_runtime
from twinmoe.moe_core.config import MoeConfig, ParallelConfig
from twinmoe.moe_core.exactness import local_parts, slice_piece
from twinmoe.moe_core.layer import MoELayer
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.routing.base import Memo, Routing, Tokens
from twinmoe.moe_core.synthetic import ScriptedRouter, Skew, choose
from twinmoe.moe_core.transformer import scoped

WIDTH, TOKENS, STEPS = 12, 24, 12
MOE = MoeConfig(num_experts=8, top_k=2, expert_hidden_size=6)
HOT = Skew.parse("hot:75:2")
MOVING = {"slots_per_rank": 3, "relayout": {"window": 2, "hysteresis": 0}}
WAYS: Mapping[str, dict[str, Any]] = {
    "static": {},
    "laer": {"planner": "relayout", "residency": "fully_sharded", **MOVING},
    "laer_borrowed": {"planner": "relayout", "residency": "borrowed", **MOVING},
    "laer_in_rounds": {"planner": "relayout", "residency": "fully_sharded", **MOVING, "max_rows_per_rank": 20},
    "llep": {
        "planner": "least_loaded",
        "residency": "borrowed",
        "least_loaded": {"min_rows": 1},
    },
}


class DriftingRouter(ScriptedRouter):
    """Two experts take three quarters of the copies; every third step it is two others."""

    def __init__(self, ops: Any, rank: int) -> None:
        super().__init__(ops, WIDTH, MOE.top_k, np.zeros((TOKENS, MOE.top_k), np.int64))
        self.step, self._rank = 0, rank

    def route(self, params: Mapping[str, Any], x_TD: Any, tokens: Tokens, memo: Memo) -> Routing:
        routing = super().route(params, x_TD, tokens, memo)
        ids = choose(HOT, MOE.num_experts, TOKENS, MOE.top_k, 100 * self.step + self._rank)
        ids_TK = self._ops.asarray((ids + 2 * (self.step // 3)) % MOE.num_experts)
        return replace(routing, ids_TK=ids_TK, chosen_TK=ids_TK)


@dataclass(frozen=True)
class Run:
    """losses: of all ranks together; changed: steps that used another layout than the one before; busiest: rows of the
    busiest rank over the mean, per step. moments: by (kind, logical expert tensor), the parts that lie on this rank,
    as (where they start, values)."""

    losses: list[float]
    changed: list[int]
    busiest: list[float]
    moments: dict[tuple[str, str], tuple[int, np.ndarray]]
    parts: dict[tuple[str, str], Any]


def train(backend: Any, comm: Communicator, way: str) -> Run:
    """Steps of AdamW on a squared distance; the same tokens, targets and choices whatever the way."""
    ops, config = backend.ops, ParallelConfig.model_validate(WAYS[way])
    runtime = make_runtime(ops, comm, Mesh.over(comm.size, comm.size), config)
    router = DriftingRouter(ops, comm.rank)
    parts = build_layer(MOE, config, runtime, LayerSpec(WIDTH, "moe.", std=0.4, std_down=0.4, router=router))
    assert isinstance(parts.layer, MoELayer)
    rng = np.random.default_rng(comm.rank)
    x_TD, want_TD = (ops.asarray(rng.standard_normal((TOKENS, WIDTH))) for _ in range(2))
    total = float(TOKENS * comm.size)

    def forward(params: Mapping[str, Any]) -> Any:
        return parts.layer(scoped(params, "moe."), x_TD, Tokens(2, total), Memo())

    groups = {**runtime.groups, "self": Group("self", (comm.rank,), 0)}
    options = TrainOptions(dtype="float64")
    state = backend.trainer.build([Component("moe", parts.parameters, forward)], options, groups, comm)
    specs = {p.name: p for p in parts.parameters}
    losses, changed, busiest = [], [], []
    for step in range(STEPS):
        router.step = step

        def loss_fn() -> tuple[Any, Any]:
            out = state.modules["moe"]()
            off = out.y - want_TD
            return (off * off).sum(-1).sum(-1) / total, out

        loss, out = backend.trainer.accumulate(state, loss_fn)
        backend.trainer.reduce_gradients(state)
        backend.trainer.clip_gradients(state, 1.0)
        backend.trainer.step(state, 0.02)
        losses.append(float(comm.gather_to_host(np.array([float(ops.to_numpy(loss))]), groups["world"]).sum()))
        changed += [step] if out.stats.figures.get("layouts_changed") else []
        rows = out.stats.plan.rows_per_rank()
        busiest.append(float(rows.max() / rows.mean()))
    found, shares = {}, {}
    for name, kind, value in backend.trainer.tensors(state):
        for piece, part in local_parts(specs[name], value):
            found[kind, piece.name], shares[kind, piece.name] = (piece.start, np.array(part)), piece
    return Run(losses, changed, busiest, found, shares)


def moved(whole: list[Run], sharded: list[Run]) -> float:
    """Largest distance of any shard, on the rank that held it at the start, from the same part of the whole tensors."""
    everything = {key: value for run in whole for key, (_, value) in run.moments.items()}
    worst = 0.0
    for run in sharded:
        for key, (_, value) in run.moments.items():
            worst = max(worst, float(np.abs(value - slice_piece(everything[key], run.parts[key])).max(initial=0.0)))
    return worst


def process(backend: Backend, launch: Launch, ways: list[str]) -> dict[str, Any]:
    """Losses and layout changes by way, of a rank of real processes."""
    comm = backend.comm.connect(launch)
    runs = {way: train(backend, comm, way) for way in ways}
    comm.close()
    return {way: {"losses": run.losses, "changed": run.changed} for way, run in runs.items()}
