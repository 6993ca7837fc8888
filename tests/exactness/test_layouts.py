"""LA-13: one call under any valid layout equals the fixed layout, outputs and every gradient."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from twinmoe.backends.reference import ops
from twinmoe.backends.reference.comm import Communicator, run_ranks
from twinmoe.backends.reference.tape import grad, variable
from twinmoe.moe_core.build import LayerSpec, build_layer, make_runtime
from twinmoe.moe_core.config import MoeConfig, ParallelConfig
from twinmoe.moe_core.exactness import local_parts
from twinmoe.moe_core.layer import MoELayer
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.planners.layout import Layout
from twinmoe.moe_core.planners.relayout import RelayoutOptions, plan_relayout
from twinmoe.moe_core.planners.static import owners, slot_table
from twinmoe.moe_core.planning import Stateless
from twinmoe.moe_core.routing.base import Memo, Tokens
from twinmoe.moe_core.transformer import scoped

WIDTH, TOKENS, RANKS, SLOTS = 8, 10, 4, 3
MOE = MoeConfig(num_experts=6, top_k=2, expert_hidden_size=5, z_loss_coeff=0.01)
HOME = slot_table(owners(MOE.num_experts, RANKS), RANKS)
Whole = tuple[list[np.ndarray], dict[str, np.ndarray]]


def call(residency: str, layout: Layout | None) -> Whole:
    """(y and gradient of x by rank, gradients of whole experts and of the router by name)."""
    relaid = {"planner": "relayout", "slots_per_rank": SLOTS} if layout is not None else {}
    config = ParallelConfig.model_validate({"residency": residency, **relaid})

    def body(comm: Communicator) -> tuple[list[np.ndarray], list[tuple[str, int, int, np.ndarray]]]:
        runtime = make_runtime(ops, comm, Mesh.over(RANKS, RANKS), config)
        parts = build_layer(MOE, config, runtime, LayerSpec(WIDTH, "moe.", std=0.5, std_down=0.5))
        layer: Any = parts.layer
        assert isinstance(layer, MoELayer)
        if layout is not None:
            table = HOME if residency == "borrowed" else None
            function = partial(plan_relayout, layout=layout, options=RelayoutOptions(SLOTS), owned_RC=table)
            layer = replace(layer, planner=Stateless(function))
        params = {p.name: variable(p.initial()) for p in parts.parameters}
        rng = np.random.default_rng(comm.rank)
        x_TD, dy_TD = variable(rng.standard_normal((TOKENS, WIDTH))), rng.standard_normal((TOKENS, WIDTH))
        out = layer(scoped(params, "moe."), x_TD, Tokens(2, float(TOKENS * RANKS)), Memo())
        d_x, *found = grad(out.y, [x_TD, *params.values()], dy_TD)
        named = []
        for parameter, value in zip(parts.parameters, found, strict=True):
            for piece, part in local_parts(parameter, value):
                flat = np.array(part).reshape(-1)
                size = int(np.prod(piece.shape))
                named.append((piece.name, piece.start, size, flat))
        return [ops.to_numpy(out.y), d_x], named

    ranks = run_ranks(RANKS, body)
    whole: dict[str, np.ndarray] = {}
    for _, named in ranks:
        for name, start, size, flat in named:
            total = whole.setdefault(name, np.zeros(size))
            kept = flat[: max(0, min(len(flat), size - start))]
            total[start : start + len(kept)] += kept
    return [array for own, _ in ranks for array in own], whole


def random_layout(seed: int) -> Layout:
    """Every expert somewhere; replicas anywhere, twice on a rank too; some slots empty."""
    rng = np.random.default_rng(seed)
    free = RANKS * SLOTS - MOE.num_experts
    table = np.concatenate([np.arange(MOE.num_experts), rng.integers(-1, MOE.num_experts, free)])
    return Layout(rng.permutation(table).reshape(RANKS, SLOTS))


@pytest.fixture(scope="module")
def fixed() -> Whole:
    return call("owned", None)


@pytest.mark.parametrize("residency", ["fully_sharded", "borrowed"])
@pytest.mark.parametrize("seed", range(6))
def test_any_layout_gives_the_outputs_and_gradients_of_the_fixed_one(seed: int, residency: str, fixed: Whole) -> None:
    tensors, whole = call(residency, random_layout(seed))
    for got, want in zip(tensors, fixed[0], strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    assert whole.keys() == fixed[1].keys()
    for name, want in fixed[1].items():
        np.testing.assert_allclose(whole[name], want, rtol=0, atol=1e-11, err_msg=name)
