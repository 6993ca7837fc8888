"""Verification that can't fail proves nothing: each fault of the field, planted, must be found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from twinmoe.backends import reference
from twinmoe.backends.protocol import Communicator
from twinmoe.backends.reference.comm import run_ranks
from twinmoe.moe_core import exactness
from twinmoe.moe_core.build import make_runtime
from twinmoe.moe_core.config import MoeConfig, ParallelConfig
from twinmoe.moe_core.exactness import Case, check_case
from twinmoe.moe_core.mesh import Mesh

MOE = MoeConfig(num_experts=4, top_k=2, expert_hidden_size=6, aux_loss_coeff=0.02, z_loss_coeff=0.01)
TIES = Case(MOE, ParallelConfig(), expert=2, routing="ties")
LLEP = ParallelConfig.model_validate(
    {
        "planner": "least_loaded",
        "residency": "borrowed",
        "least_loaded": {"min_rows": 1, "imbalance_threshold": None},
    }
)
FSEP = ParallelConfig(residency="fully_sharded", slots_per_rank=4)


def passes(case: Case, home: Any = reference, world: int = 4) -> bool:
    def rank(comm: Communicator) -> bool:
        runtime = make_runtime(home.ops, comm, Mesh.over(world, case.expert), case.parallel)
        return check_case(case, home, runtime).passed(1e-10)

    return all(run_ranks(world, rank))


def with_faults(ops: dict[str, Any] | None = None, trainer: dict[str, Any] | None = None) -> Any:
    """The reference with some functions replaced."""
    return SimpleNamespace(
        ops=SimpleNamespace(**{**vars(reference.ops), **(ops or {})}),
        trainer=SimpleNamespace(**{**vars(reference.trainer), **(trainer or {})}),
        comm=reference.comm,
    )


def test_without_a_fault_it_passes() -> None:
    assert passes(TIES)
    assert passes(replace(TIES, parallel=LLEP, routing="same_experts", expert=4))
    assert passes(replace(TIES, parallel=FSEP, routing="same_experts"))


def test_a_wrong_sign_in_combine_is_found() -> None:
    combine = reference.ops.combine_rows
    assert not passes(TIES, with_faults({"combine_rows": lambda r, i, w: combine(r, i, w * -1.0)}))


def test_a_dropped_replica_gradient_is_found() -> None:
    def drop(state: Any) -> None:
        alone = {**state.groups, "expert_data": state.groups["self"]}
        reference.trainer.reduce_gradients(SimpleNamespace(**{**vars(state), "groups": alone}))  # type: ignore[arg-type]

    assert not passes(TIES, with_faults(trainer={"reduce_gradients": drop}))


def test_an_expert_gradient_averaged_over_all_ranks_is_found() -> None:
    assert not passes(TIES, with_faults(trainer={"reduce_gradients": _scaled_reduction(1 / 4)}))


def _scaled_reduction(scale: float) -> Callable[[Any], None]:
    def reduce(state: Any) -> None:
        reference.trainer.reduce_gradients(state)
        for name, grad in state.grads.items():
            if "w_up" in name or "w_down" in name:
                state.grads[name] = grad * scale

    return reduce


def test_a_norm_that_counts_experts_twice_is_found() -> None:
    def clip(state: Any, max_norm: float | None) -> float:
        doubled = {n: g * (2**0.5 if "w_up" in n else 1.0) for n, g in state.grads.items()}
        faulty: Any = SimpleNamespace(**{**vars(state), "grads": doubled})
        return reference.trainer.clip_gradients(faulty, max_norm)

    assert not passes(TIES, with_faults(trainer={"clip_gradients": clip}))


def test_ties_that_go_to_the_higher_id_are_found() -> None:
    def topk(scores_TE: Any, k: int) -> Any:
        scores = reference.ops.to_numpy(scores_TE)
        order = np.argsort(-scores[:, ::-1], axis=1, kind="stable")[:, :k]
        return reference.ops.asarray(scores.shape[1] - 1 - order)

    assert not passes(TIES, with_faults({"topk": topk}))


def test_padding_that_enters_the_balance_loss_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    padded = replace(TIES, routing="padding_tail")
    assert passes(padded)
    original = exactness.Tokens
    monkeypatch.setattr(exactness, "Tokens", lambda **fields: original(**{**fields, "real_T": None}))
    assert not passes(padded)


def test_a_lost_reverse_send_of_weight_gradients_is_found() -> None:
    lost = replace(TIES, parallel=LLEP, routing="same_experts", expert=4)
    take = reference.ops.take_rows

    def take_rows(x: Any, index_N: Any) -> Any:
        flat_experts = len(x.shape) == 2 and x.shape[1] > 2 * exactness.WIDTH
        return take(reference.ops.stop_gradient(x) if flat_experts else x, index_N)

    assert not passes(lost, with_faults({"take_rows": take_rows}))


def test_a_replica_left_out_of_the_reshard_sum_is_found() -> None:
    sharded = replace(TIES, parallel=FSEP, routing="same_experts", expert=4)
    take = reference.ops.take_rows

    def take_rows(x: Any, index_N: Any) -> Any:
        index = reference.ops.to_numpy(index_N)
        if len(x.shape) != 2 or x.shape[0] != MOE.num_experts or len(index) != 16:
            return take(x, index_N)
        first = np.zeros(len(index), bool)
        first[np.unique(index, return_index=True)[1]] = True
        whole, seen = take(x, index_N), reference.ops.asarray(first.reshape(-1, 1))
        return reference.ops.where(seen, whole, reference.ops.stop_gradient(whole))

    assert passes(sharded)
    assert not passes(sharded, with_faults({"take_rows": take_rows}))
