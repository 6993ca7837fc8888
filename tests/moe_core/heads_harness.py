"""Layers and small models with many heads on virtual ranks of the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from twinmoe.backends import reference
from twinmoe.backends.protocol import Piece, TrainOptions
from twinmoe.backends.reference.comm import Call, Communicator, run_ranks
from twinmoe.backends.reference.tape import Var, variable
from twinmoe.moe_core.build import LayerParts, LayerSpec, Runtime, build_layer, make_runtime
from twinmoe.moe_core.config import Config, MoeConfig, ParallelConfig
from twinmoe.moe_core.data import GlobalBatch
from twinmoe.moe_core.layer import MoEOutput
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.model import Model, build_model
from twinmoe.moe_core.routing.base import Memo, Tokens
from twinmoe.moe_core.transformer import scoped

WIDTH = 12
MOE = MoeConfig(
    num_heads=8, head_dim=3, num_experts=4, top_k=2, expert_hidden_size=5, activation="gelu", aux_loss_coeff=0.0
)


@dataclass
class Lone:
    """One layer on one rank, outside a trainer: leaves by short name."""

    parts: LayerParts
    leaves: dict[str, Var]

    def __call__(self, x_TD: Var, tokens: Tokens, memo: Memo | None = None) -> MoEOutput:
        return self.parts.layer(self.leaves, x_TD, tokens, memo or Memo())


def lone_layer(moe: MoeConfig, runtime: Runtime, parallel: ParallelConfig | None = None, width: int = WIDTH) -> Lone:
    parts = build_layer(moe, parallel or ParallelConfig(), runtime, LayerSpec(width, "moe.", std=0.5, std_down=0.5))
    return Lone(parts, scoped({p.name: variable(p.initial()) for p in parts.parameters}, "moe."))


def runtime_of(comm: Communicator, head: int = 1, expert: int = 1) -> Runtime:
    return make_runtime(reference.ops, comm, Mesh.over(comm.size, expert, head))


def alone(fn: Callable[[Communicator], Any]) -> Any:
    return run_ranks(1, fn)[0]


def exchanges(comm: Communicator, since: int = 0) -> list[Call]:
    """Collectives logged since a mark."""
    return comm.log[since:]


def logical(parts: LayerParts | Model, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Local tensors by the names that checkpoints use."""
    specs = parts.parameters.values() if isinstance(parts, Model) else parts.parameters
    found: dict[str, np.ndarray] = {}
    for spec in specs:
        rows = (
            zip(spec.pieces, values[spec.name]) if spec.pieces else [(Piece(spec.name, spec.shape), values[spec.name])]
        )
        found.update({piece.name: value for piece, value in rows})
    return found


# --- a small model in training ---------------------------------------------------------------
def small_config(moe: MoeConfig = MOE, recompute: str = "none", head_chunks: int = 1) -> Config:
    return Config.model_validate(
        {
            "model": {
                "vocab_size": 11,
                "hidden_size": WIDTH,
                "num_layers": 2,
                "num_attention_heads": 2,
                "init_std": 0.4,
            },
            "moe": moe.model_dump(),
            "parallel": {"head_chunks": head_chunks},
            "train": {"dtype": "float64", "global_batch_size": 8, "sequence_length": 6, "recompute": recompute},
        }
    )


def batch_of(step: int, padding: bool = False, sequences: int = 8, length: int = 6) -> GlobalBatch:
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, 11, (sequences, length))
    real = np.ones(tokens.shape, bool)
    if padding:
        real[-1, 2:], real[2] = False, False
    targets = np.where(real, rng.integers(0, 11, tokens.shape), -1)
    documents = np.where(real, 0, 1)
    places = np.arange(sequences)
    return GlobalBatch(tokens, targets, real, documents, places, places * 0, int(real.sum()), int(real.sum()))


@dataclass(frozen=True)
class Trained:
    """By logical name: gradients of the first step (reduced), parameters after all; and what was seen on the way."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, np.ndarray]
    parameters: dict[str, np.ndarray]
    router_states: dict[int, dict[str, np.ndarray]]
    log: list[Call]


def train(config: Config, comm: Communicator, head: int = 1, expert: int = 1, **options: Any) -> Trained:
    """Three AdamW steps on this rank. options: steps, padding, micro (batch size), trainer."""
    home = options.get("trainer", reference.trainer)
    runtime = runtime_of(comm, head, expert)
    model = build_model(config, runtime)
    state = home.build(model.components, TrainOptions(dtype="float64"), runtime.groups, comm)
    states, losses, norms, first = model.initial_router_states(), [], [], {}
    world = runtime.groups["world"]
    for step in range(options.get("steps", 3)):
        batch = batch_of(step, options.get("padding", False)).for_rank(comm.rank, comm.size)
        loss, totals = 0.0, {}
        for micro in batch.micro_batches(options.get("micro")):
            value, output = home.accumulate(
                state, partial(model.loss, state.modules, micro, step, router_states=states)
            )
            loss += float(reference.ops.to_numpy(value))
            for layer, stats in zip(model.moe_layers, output.stats, strict=True):
                seen = reference.ops.to_numpy(stats.statistics["chosen_E"])
                totals[layer] = totals.get(layer, 0) + seen
        home.reduce_gradients(state)
        first = first or home.gradients(state)
        norms.append(home.clip_gradients(state, 0.5))
        home.step(state, 0.01)
        losses.append(float(comm.gather_to_host(np.array(loss), world).sum()))
        counts = {layer: comm.gather_to_host(totals[layer], world).sum(0) for layer in model.moe_layers}
        states = {i: r.update_state(states[i], {"chosen_E": counts[i]}) for i, r in model.routers.items()}
    values = {name: value for name, kind, value in home.tensors(state) if kind == "parameter"}
    return Trained(losses, norms, logical(model, first), logical(model, values), states, list(comm.log))


def relative(a: np.ndarray, b: np.ndarray, floor: float) -> float:
    return float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(b)), floor, 1e-300)


def worst(found: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> float:
    """Largest relative error of a tensor (below 1e-3 of the largest norm, relative to that)."""
    floor = 1e-3 * max(float(np.linalg.norm(v)) for v in right.values())
    return max(relative(value, right[name], floor) for name, value in found.items())
