"""How often a layer waits for the device: copies to the host, forward and backward, by the way it runs."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from twinmoe.backends import reference
from twinmoe.backends.reference.comm import Communicator, run_ranks
from twinmoe.backends.reference.tape import grad, variable
from twinmoe.moe_core.build import LayerSpec, build_layer, make_runtime
from twinmoe.moe_core.config import ClusterConfig, LevelConfig, MoeConfig, ParallelConfig
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.routing.base import Memo, Tokens
from twinmoe.moe_core.transformer import scoped

WIDTH, TOKENS = 8, 6
MOE: dict[str, Any] = {"num_experts": 8, "top_k": 2, "expert_hidden_size": 4, "z_loss_coeff": 0.001}
CLUSTER = ClusterConfig(levels=(LevelConfig(name="node", size=2), LevelConfig(name="cluster")))


@dataclass(frozen=True)
class Way:
    """A layer, how it runs, and the copies that its docstrings promise."""

    name: str
    copies: int
    ranks: int = 4
    mesh: dict[str, int] = field(default_factory=lambda: {"expert": 4})
    parallel: dict[str, Any] = field(default_factory=dict)
    moe: dict[str, Any] = field(default_factory=dict)
    recompute: bool = False


LOSSES_AND_CAPACITY = {
    "capacity_factor": "1.0",
    "entropy_loss_coeff": 0.1,
    "router_jitter": 0.1,
    "bias_update_rate": 0.01,
    "nan_policy": "skip",
    "num_shared_experts": 1,
}
HEADS = {"num_heads": 4, "head_dim": 2}
LLEP = {"planner": "least_loaded", "residency": "borrowed"}
LAER = {"planner": "relayout", "residency": "fully_sharded"}
DEDUP = {"transport": "hierarchical_dedup"}
WAYS = [
    Way("alone", 0, 1, {}),
    Way("alone, with everything a router may do", 0, 1, {}, moe=LOSSES_AND_CAPACITY),
    Way("alone, expert choice", 0, 1, {}, moe={"router": "expert_choice"}),
    Way("replicas without expert parallelism", 0, 2, {}),
    Way("flat", 1),
    Way("flat, with everything a router may do", 1, moe=LOSSES_AND_CAPACITY),
    Way("flat, experts recomputed", 1, recompute=True),
    Way("flat, expert x data", 1, 4, {"expert": 2}),
    Way("groupwise", 1, 4, {"expert": 2, "tensor": 2}, {"transport": "groupwise"}),
    Way("least loaded, borrowed", 1, parallel=LLEP),
    Way("relayout, sharded", 1, parallel=LAER),
    Way("hierarchical", 2, parallel=DEDUP),
    Way("hierarchical, least loaded", 2, parallel={**DEDUP, **LLEP}),
    Way("head parallel", 0, 4, {"head": 4}, {"head_parallel_size": 4}, HEADS),
    Way("head parallel, experts inside a head shared by two ranks", 1, 4, {"head": 2, "expert": 2}, {}, HEADS),
]


class Watched:
    """A communicator and operations of one rank that count what reaches the host."""

    def __init__(self, comm: Communicator) -> None:
        self._comm, self.copies, self.lock = comm, 0, threading.Lock()
        self.ops: Any = SimpleNamespace(**{**vars(reference.ops), "to_numpy": self._counted(reference.ops.to_numpy)})
        self.gather_to_host = self._counted(comm.gather_to_host)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def _counted(self, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            with self.lock:
                self.copies += 1
            return function(*arguments)

        return call


def copies_of(way: Way, calls: int) -> list[int]:
    """Copies of each rank in `calls` forward and backward passes."""
    moe = MoeConfig.model_validate({**MOE, **way.moe})
    parallel = ParallelConfig.model_validate(way.parallel)

    def body(comm: Communicator) -> int:
        watched: Any = Watched(comm)
        runtime = make_runtime(watched.ops, watched, Mesh.over(comm.size, **way.mesh), parallel, CLUSTER)
        parts = build_layer(moe, parallel, runtime, LayerSpec(WIDTH, "moe.", checkpoint_experts=way.recompute))
        leaves = scoped({p.name: variable(p.initial()) for p in parts.parameters}, "moe.")
        built = watched.copies
        for seed in range(calls):
            rng = np.random.default_rng([comm.rank // runtime.mesh.tensor, seed])
            x_TD = variable(rng.standard_normal((TOKENS, WIDTH)))
            tokens = Tokens(sequences=2, total=float(TOKENS * runtime.mesh.token_ranks), training=True)
            out = parts.layer(leaves, x_TD, tokens, Memo())
            grad(out.y, [x_TD, *leaves.values()], rng.standard_normal(out.y.shape))
        return watched.copies - built

    return run_ranks(way.ranks, body)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_a_layer_copies_to_the_host_as_often_as_promised(way: Way) -> None:
    assert copies_of(way, 1) == [way.copies] * way.ranks
    assert copies_of(way, 3) == [3 * way.copies] * way.ranks
