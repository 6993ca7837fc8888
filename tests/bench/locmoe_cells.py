"""The training runs of the LocMoE study, and the gate that it adds to those of the package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from twinmoe.backends.protocol import Array, Parameter
from twinmoe.moe_core.config import Config
from twinmoe.moe_core.parameters import draw_dense
from twinmoe.moe_core.routing import Choice, Memo, RouterContext, Tokens, gate, register_router, router_names

NODES, EXPERTS, STEPS = 2, 8, 3000


@dataclass(frozen=True)
class Cell:
    """One training run. mu: locality coefficient; ramp: share of the steps before it sets in (0: from the start)."""

    router: str = "switch"
    top_k: int = 1
    mu: float = 0.0
    assignment: str = "by_domain"
    ramp: float = 0.0
    gradient: str = "model"
    scope: str = "node"
    seed: int = 0
    steps: int = STEPS
    more: tuple[tuple[str, Any], ...] = field(default=())

    @property
    def setting(self) -> str:
        """What distinguishes it, without the seed."""
        parts = [self.router, f"top{self.top_k}", *(f"{name}={value}" for name, value in self.more)]
        parts += [f"mu{self.mu:g}", self.assignment]
        parts += [f"ramp{self.ramp:g}"] if self.ramp else []
        parts += ["router-only"] if self.gradient == "router" else []
        parts += ["per-sequence"] if self.scope == "sequence" else []
        return " ".join([*parts, f"{self.steps}steps"])

    @property
    def name(self) -> str:
        """The setting with its seed."""
        return f"{self.setting} seed{self.seed}"


GRAP = (("score_scale", "sqrt"),)
RESONANCE = (*GRAP, ("capacity_factor", "1.25"))
GROUPS = (("num_groups", NODES), ("inner_router", "topk"))
RANDOM = (("num_groups", NODES), ("inner_router", "random"))
LONG = 3 * STEPS


class ContextGate:
    """Switch's gate that also sees where a token stands: x W + c V, c = normalised mean of the sequence so far."""

    def __init__(self, context: RouterContext) -> None:
        self._context = context

    def parameters(self, prefix: str) -> tuple[Parameter, ...]:
        context = self._context
        shape = (context.width, context.moe.num_experts)

        def drawn(name: str) -> Parameter:
            return Parameter(name, shape, draw_dense(context.seed, name, shape, context.std), master=True)

        return drawn(prefix + "w_router"), drawn(prefix + "w_context")

    def choose(self, params: Mapping[str, Array], x_TD: Array, tokens: Tokens, memo: Memo) -> Choice:
        ops, width = self._context.ops, self._context.width
        length = x_TD.shape[0] // tokens.sequences
        so_far = np.tril(np.ones((length, length))) / np.arange(1, length + 1)[:, None]
        x_SLD = x_TD.reshape((tokens.sequences, length, width))
        mean_TD = (ops.cast(ops.asarray(so_far), ops.dtype_of(x_TD)) @ x_SLD).reshape((-1, width))
        scale_T1 = ops.sqrt((mean_TD * mean_TD).mean(-1).reshape((-1, 1)) + 1e-6)
        logits_TE = x_TD @ params["w_router"] + (mean_TD / scale_T1) @ params["w_context"]
        return gate(self._context, logits_TE, tokens, memo)


if "context_gate" not in router_names():
    register_router("context_gate", ContextGate)


def cells() -> Iterator[Cell]:
    """The most telling first: a study that is cut short still says something."""
    for seed in range(5):
        yield from main_cells(seed)
    for settings in (other_cells, further_cells):
        for seed in range(5):
            yield from settings(seed)
    for seed in range(3):
        yield from long_cells(seed)
    for seed in range(2):
        yield from last_cells(seed)


def main_cells(seed: int) -> Iterator[Cell]:
    """Switch, LocMoE's gate, tables and PanGu-Sigma's domain level, with locality by domain and by affinity."""
    yield Cell(seed=seed)
    yield Cell(mu=0.1, ramp=0.3, seed=seed)
    yield Cell("hierarchical", seed=seed, more=GROUPS)
    yield Cell(mu=0.1, assignment="by_affinity", ramp=0.3, seed=seed)
    yield Cell("grap", mu=0.1, ramp=0.3, seed=seed, more=GRAP)
    yield Cell("hash", seed=seed)
    yield Cell(mu=0.3, ramp=0.3, seed=seed)
    yield Cell("grap", seed=seed, more=GRAP)
    yield Cell("topk", 2, seed=seed)
    yield Cell("hierarchical", seed=seed, more=RANDOM)


def long_cells(seed: int) -> Iterator[Cell]:
    """Three times as long."""
    yield Cell(seed=seed, steps=LONG)
    yield Cell(mu=0.1, ramp=0.3, seed=seed, steps=LONG)
    yield Cell("context_gate", mu=0.1, ramp=0.3, seed=seed, steps=LONG)
    yield Cell("hierarchical", seed=seed, steps=LONG, more=GROUPS)


def other_cells(seed: int) -> Iterator[Cell]:
    """A gate that sees context, other coefficients, the control, no ramp, gradient to the router only, top-2, ETR."""
    yield Cell("context_gate", mu=0.1, ramp=0.3, seed=seed)
    yield Cell("context_gate", mu=0.1, assignment="by_affinity", ramp=0.3, seed=seed)
    yield Cell("context_gate", seed=seed)
    yield Cell(mu=0.03, ramp=0.3, seed=seed)
    yield Cell(mu=0.2, ramp=0.3, seed=seed)
    yield Cell(mu=0.1, seed=seed)
    yield Cell(mu=0.3, ramp=0.3, gradient="router", seed=seed)
    yield Cell(mu=0.1, assignment="round_robin", ramp=0.3, seed=seed)
    yield Cell("topk", 2, mu=0.1, ramp=0.3, seed=seed)
    yield Cell("expert_token_resonance", seed=seed, more=RESONANCE)
    yield Cell("expert_token_resonance", mu=0.1, ramp=0.3, seed=seed, more=RESONANCE)
    yield Cell("context_gate", mu=0.3, assignment="by_affinity", ramp=0.3, gradient="router", seed=seed)


def further_cells(seed: int) -> Iterator[Cell]:
    """Combinations."""
    yield Cell("context_gate", mu=0.3, assignment="by_affinity", ramp=0.3, seed=seed)
    yield Cell(mu=0.2, assignment="by_affinity", ramp=0.3, seed=seed)
    yield Cell("context_gate", mu=0.3, ramp=0.3, gradient="router", seed=seed)
    yield Cell("grap", mu=0.3, ramp=0.3, seed=seed, more=GRAP)
    yield Cell("grap", mu=0.1, assignment="by_affinity", ramp=0.3, seed=seed, more=GRAP)
    yield Cell(mu=0.3, seed=seed)
    yield Cell(mu=0.3, assignment="by_affinity", ramp=0.3, seed=seed)
    yield Cell("hierarchical", seed=seed, more=(("num_groups", NODES), ("inner_router", "grap"), *GRAP))
    yield Cell(mu=0.1, ramp=0.3, gradient="router", seed=seed)
    yield Cell("hierarchical", 2, seed=seed, more=GROUPS)


def last_cells(seed: int) -> Iterator[Cell]:
    """The control at the other coefficients, each sequence for itself, hard pulls."""
    for mu in (0.03, 0.2, 0.3):
        yield Cell(mu=mu, assignment="round_robin", ramp=0.3, seed=seed)
    yield Cell(mu=0.1, ramp=0.3, scope="sequence", seed=seed)
    yield Cell("topk", 2, mu=0.3, ramp=0.3, seed=seed)
    yield Cell(mu=1.0, ramp=0.3, gradient="router", seed=seed)


def config_of(cell: Cell) -> Config:
    """A quarter of the quick-start: three blocks of width 64, sequences of 64 bytes."""
    start = round(cell.ramp * cell.steps)
    moe = {
        "num_experts": EXPERTS, "top_k": cell.top_k, "expert_hidden_size": 128, "router": cell.router,
        "aux_loss_coeff": 0.01, "z_loss_coeff": 0.001, "locality_nodes": NODES, "locality_loss_coeff": cell.mu,
        "locality_gradient": cell.gradient, "locality_scope": cell.scope, "locality_start_step": start,
        "locality_ramp_steps": start // 3, **dict(cell.more),
    }  # fmt: skip
    model = {
        "vocab_size": 257, "hidden_size": 64, "num_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "tie_embeddings": True,
    }  # fmt: skip
    train = {
        "steps": cell.steps, "seed": cell.seed, "global_batch_size": 16, "sequence_length": 64, "learning_rate": 3e-3,
        "min_learning_rate": 3e-4, "warmup_steps": 40,
    }  # fmt: skip
    return Config.model_validate({"model": model, "moe": moe, "train": train})
