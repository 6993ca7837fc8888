"""Router states in a training loop: one update per optimizer step, alike on every rank, saved and taken up."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
from twinmoe.backends import reference
from twinmoe.backends.protocol import TrainOptions
from twinmoe.backends.reference.comm import Communicator, run_ranks
from twinmoe.moe_core.build import make_runtime
from twinmoe.moe_core.checkpoint import CheckpointError
from twinmoe.moe_core.config import MoeConfig
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.model import build_model
from twinmoe.moe_core.router_states import RouterStates
from twinmoe.testing.moe_core.heads_harness import MOE, batch_of, small_config

PLAIN = MoeConfig(num_experts=4, top_k=2, expert_hidden_size=5, bias_update_rate=0.05, aux_loss_coeff=0.0)
HEADS = MOE.model_copy(update={"bias_update_rate": 0.05})


def biases(comm: Communicator, moe: MoeConfig, head: int = 1, micro: int | None = None, steps: int = 3) -> RouterStates:
    """States after some steps at learning rate zero: only the routers' states move."""
    runtime = make_runtime(reference.ops, comm, Mesh.over(comm.size, head=head))
    model = build_model(small_config(moe), runtime)
    state = reference.trainer.build(model.components, TrainOptions(dtype="float64"), runtime.groups, comm)
    routers = RouterStates(model.routers)
    for step in range(steps):
        for part in batch_of(step).for_rank(comm.rank, comm.size).micro_batches(micro):
            run = partial(model.loss, state.modules, part, step, True, routers.states)
            _, output = reference.trainer.accumulate(state, run)
            routers.add(reference.ops, output.stats)
        routers.update(comm, runtime.groups["world"])
    return routers


@pytest.mark.parametrize("moe", [PLAIN, HEADS], ids=["plain", "heads"])
def test_ranks_and_micro_batches_do_not_change_the_bias(moe: MoeConfig) -> None:
    right = run_ranks(1, lambda comm: biases(comm, moe))[0].states
    assert all(np.abs(state["bias"]).max() > 0.05 for state in right.values())
    head = 1 if moe is PLAIN else 4
    for ranks, micro in ((1, 2), (4, None), (4, 1)):
        split = head if ranks > 1 else 1
        for found in run_ranks(ranks, lambda comm, s=split, m=micro: biases(comm, moe, s, m)):
            assert set(found.states) == set(right) == {0, 1}
            for layer, state in right.items():
                np.testing.assert_array_equal(found.states[layer]["bias"], state["bias"])


def test_routers_without_state_cost_no_collective() -> None:
    def calls(comm: Communicator) -> list[str]:
        routers = biases(comm, PLAIN.model_copy(update={"bias_update_rate": 0.0}))
        assert routers.states == {}
        return [c.name for c in comm.log]

    assert run_ranks(2, calls)[0] == []


def test_a_manifest_brings_the_same_state_back() -> None:
    def one(comm: Communicator) -> None:
        routers, other = biases(comm, HEADS), biases(comm, HEADS, steps=0)
        other.restore(json.loads(json.dumps(routers.as_json())))
        for layer, state in routers.states.items():
            np.testing.assert_array_equal(other.states[layer]["bias"], state["bias"])
        plain = biases(comm, PLAIN, steps=0)
        for saved in ({}, routers.as_json()):
            with pytest.raises(CheckpointError, match="resume with the config"):
                plain.restore(saved)

    run_ranks(1, one)
