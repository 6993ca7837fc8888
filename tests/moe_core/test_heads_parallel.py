"""Head Parallel trains as one process does: W = 1, 2, 4, 8 and HP x EP. Sheet B7: P5, P11, P12; planted faults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from twinmoe.backends import reference
from twinmoe.backends.protocol import Component, Parameter, TrainOptions
from twinmoe.backends.reference.comm import Communicator, run_ranks
from twinmoe.moe_core.build import LayerParts, LayerSpec, Runtime, build_layer, make_runtime
from twinmoe.moe_core.checkpoint import Checkpoint
from twinmoe.moe_core.config import ParallelConfig
from twinmoe.moe_core.exactness import Case, check_case
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.saving import publish, write_shard
from twinmoe.testing.moe_core.heads_harness import MOE, Trained, alone, runtime_of, small_config, train, worst

KINDS = ("parameter", "exp_avg")
LAYOUTS = {"W=1": (1, 1), "W=2": (2, 1), "W=4": (4, 1), "W=8": (8, 1), "HP2xEP2": (2, 2), "EP4": (1, 4)}
BALANCED = MOE.model_copy(update={"aux_loss_coeff": 0.02, "z_loss_coeff": 0.01, "bias_update_rate": 0.05})


def trained(layout: str, **options: Any) -> list[Trained]:
    head, expert = LAYOUTS[layout]
    model = options.pop("moe", BALANCED), options.pop("recompute", "none"), options.pop("head_chunks", 1)
    config = small_config(*model)
    return run_ranks(head * expert, lambda comm: train(config, comm, head, expert, **options))


@pytest.fixture(scope="module")
def one_process() -> Trained:
    return trained("W=1", padding=True)[0]


# --- the same training -----------------------------------------------------------------------
@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "W=1"])
def test_p5_losses_gradients_norms_and_parameters_are_those_of_one_process(layout: str, one_process: Trained) -> None:
    for rank in trained(layout, padding=True):
        np.testing.assert_allclose(rank.losses, one_process.losses, rtol=1e-10)
        np.testing.assert_allclose(rank.norms, one_process.norms, rtol=1e-10)
        assert worst(rank.gradients, one_process.gradients) < 1e-10
        assert worst(rank.parameters, one_process.parameters) < 1e-10
        for layer, state in one_process.router_states.items():
            np.testing.assert_array_equal(rank.router_states[layer]["bias"], state["bias"])


@pytest.mark.parametrize("options", [{"micro": 1}, {"recompute": "experts"}, {"recompute": "layer"}], ids=str)
def test_micro_batches_and_recomputation_change_nothing(options: dict[str, Any], one_process: Trained) -> None:
    for rank in trained("HP2xEP2", padding=True, **options):
        np.testing.assert_allclose(rank.losses, one_process.losses, rtol=1e-10)
        assert worst(rank.parameters, one_process.parameters) < 1e-10


@pytest.mark.parametrize("layout", ["W=1", "W=2", "W=4"])
@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_halves_whose_exchanges_overlap_change_nothing(layout: str, recompute: str, one_process: Trained) -> None:
    for rank in trained(layout, padding=True, head_chunks=2, recompute=recompute):
        np.testing.assert_allclose(rank.losses, one_process.losses, rtol=1e-10)
        np.testing.assert_allclose(rank.norms, one_process.norms, rtol=1e-10)
        assert worst(rank.parameters, one_process.parameters) < 1e-10
        for layer, state in one_process.router_states.items():
            np.testing.assert_array_equal(rank.router_states[layer]["bias"], state["bias"])


def test_the_bias_of_all_heads_has_moved(one_process: Trained) -> None:
    for state in one_process.router_states.values():
        assert np.abs(state["bias"]).max(1).min() > 0
        np.testing.assert_allclose(state["bias"].sum(1), 0, atol=1e-12)


def test_a_micro_batch_costs_one_mask_and_four_exchanges_a_layer() -> None:
    moe = BALANCED.model_copy(update={"aux_loss_coeff": 0.0, "z_loss_coeff": 0.0})

    def heads_calls(padding: bool) -> list[str]:
        rank = trained("W=4", moe=moe, padding=padding, steps=1)[0]
        return [c.name for c in rank.log if c.group == "head"]

    with_padding, without = heads_calls(True), heads_calls(False)
    assert without.count("all_to_all") == with_padding.count("all_to_all") == 2 * 4  # two layers
    assert with_padding.count("all_gather") == 1
    assert "all_gather" not in without
    assert "gather_to_host" not in with_padding


@pytest.mark.parametrize(
    "parallel",
    [
        {"planner": "least_loaded", "residency": "borrowed"},
        {"residency": "fully_sharded"},
        {"transport": "hierarchical_dedup"},
    ],
    ids=lambda p: next(reversed(p.values())),
)
@pytest.mark.parametrize("routing", ["random", "ties", "same_experts", "padding_only"])
def test_planners_transports_and_residencies_work_inside_a_head_s_ranks(parallel: dict[str, Any], routing: str) -> None:
    case = Case(BALANCED.model_copy(update={"head_dim": 3}), ParallelConfig(**parallel), 2, 2, routing=routing)

    def rank(comm: Communicator) -> bool:
        runtime = make_runtime(reference.ops, comm, Mesh.over(4, 2, 2), case.parallel)
        return check_case(case, reference, runtime).passed(1e-10)

    assert all(run_ranks(4, rank))


@pytest.mark.parametrize("residency", ["owned", "fully_sharded"])
def test_a_checkpoint_of_four_heads_ranks_is_read_by_any_other_layout(residency: str, tmp_path: Path) -> None:
    parallel = ParallelConfig.model_validate({"residency": residency})

    def layer(comm: Communicator, head: int, expert: int) -> tuple[LayerParts, Runtime]:
        runtime = runtime_of(comm, head, expert)
        return build_layer(MOE, parallel, runtime, LayerSpec(12, "moe.", seed=3)), runtime

    def save(comm: Communicator) -> None:
        parts, runtime = layer(comm, 4, 2)
        tensors = ((p.name, kind, p.initial() + i) for p in parts.parameters for i, kind in enumerate(KINDS))
        write_shard(tmp_path / "new", comm.rank, {p.name: p for p in parts.parameters}, runtime.groups, tensors)

    def load(comm: Communicator, head: int, expert: int) -> int:
        parts, _ = layer(comm, head, expert)
        specs, checkpoint = (
            {p.name: p for p in parts.parameters},
            Checkpoint(tmp_path / "checkpoints" / "step_00000001"),
        )
        found = list(checkpoint.values(specs))
        for name, kind, value in found:
            padding = specs[name].initial() == 0  # of shards
            np.testing.assert_array_equal(value[~padding], (specs[name].initial() + KINDS.index(kind))[~padding])
        return len(found)

    (tmp_path / "new").mkdir()
    run_ranks(8, save)
    (tmp_path / "checkpoints").mkdir()
    publish(tmp_path / "new", tmp_path / "checkpoints" / "step_00000001", 8, {"step": 1, "updates": 1})
    for head, expert in ((1, 1), (2, 1), (2, 2), (1, 4), (8, 1)):
        counts = run_ranks(head * expert, lambda comm, h=head, e=expert: load(comm, h, e))
        assert counts == [5 * len(KINDS)] * (head * expert)


# --- the scale of gradients ------------------------------------------------------------------
def test_w_fold_head_gradients_are_found(one_process: Trained) -> None:
    """The fault of the released loop: gradients of heads W times those of the global mean."""

    def reduce_gradients(state: Any) -> None:
        reference.trainer.reduce_gradients(state)
        for name, spec in state.parameters.items():
            if spec.norm_over is not None:
                state.grads[name] = state.grads[name] * 4

    faulty = SimpleNamespace(**{**vars(reference.trainer), "reduce_gradients": reduce_gradients})
    rank = trained("W=4", padding=True, trainer=faulty)[0]
    heads = {n: g for n, g in rank.gradients.items() if "heads" in n}
    assert worst(heads, {n: one_process.gradients[n] * 4 for n in heads}) < 1e-10
    assert worst(rank.gradients, one_process.gradients) > 1
    assert abs(rank.norms[0] / one_process.norms[0] - 1) > 0.1


def test_heads_reduced_over_the_ranks_that_share_them_are_found(one_process: Trained) -> None:
    """Another: averaging different heads as if they were replicas."""

    def build(components: Any, options: Any, groups: Any, comm: Any) -> Any:
        wrong = [
            replace(c, parameters=tuple(replace(p, reduce_over="world") for p in c.parameters)) for c in components
        ]
        return reference.trainer.build(wrong, options, groups, comm)

    faulty = SimpleNamespace(**{**vars(reference.trainer), "build": build})
    assert worst(trained("W=2", padding=True, trainer=faulty)[0].gradients, one_process.gradients) > 0.1


def head_and_replica(comm: Communicator, head: float, replica: float, x: float, max_norm: float | None) -> Any:
    """loss_r = (head parameter of this rank) * x_r * head + replica parameter * replica / ranks."""
    groups = runtime_of(comm, head=comm.size).groups
    theta = Parameter("theta", (1,), lambda: np.ones(1), reduce_over="head_data", norm_over="head")
    shared = Parameter("shared", (1,), lambda: np.ones(1))

    def forward(p: dict[str, Any]) -> Any:
        return (p["theta"] * (head * x) + p["shared"] * (replica / comm.size)).sum(0)

    state = reference.trainer.build([Component("c", (theta, shared), forward)], TrainOptions(), groups, comm)
    reference.trainer.accumulate(state, lambda: (state.modules["c"](), None))
    reference.trainer.reduce_gradients(state)
    norm = reference.trainer.clip_gradients(state, max_norm)
    return norm, {n: float(g[0]) for n, g in reference.trainer.gradients(state).items()}


def test_p11_local_losses_divided_by_global_counts_need_no_averaging() -> None:
    """Four ranks with x = 1, 2, 3, 4: a head that all of them visit gets 10 from means over own tokens (divided by
    nothing else), and 2.5, the gradient of the global mean, from losses divided by the tokens of all."""

    def gradient(comm: Communicator, divisor: float) -> float:
        theta = Parameter("theta", (1, 4), lambda: np.ones((1, 4)), reduce_over="head_data", norm_over="head")
        groups = runtime_of(comm, head=4).groups

        def forward(p: dict[str, Any]) -> Any:
            arrived = comm.all_to_all(reference.ops.asarray(np.full((4, 1), 1.0 + comm.rank)), groups["head"])
            return (arrived.reshape((1, 4)) * p["theta"]).sum(1).sum(0) * (1 / divisor)

        state = reference.trainer.build([Component("c", (theta,), forward)], TrainOptions(), groups, comm)
        reference.trainer.accumulate(state, lambda: (state.modules["c"](), None))
        reference.trainer.reduce_gradients(state)
        return float(reference.trainer.gradients(state)["theta"].sum())

    assert run_ranks(4, lambda comm: gradient(comm, 1.0)) == [10.0] * 4
    assert run_ranks(4, lambda comm: gradient(comm, 4.0)) == [2.5] * 4


def test_p12_the_norm_counts_heads_once_and_replicas_get_one_coefficient() -> None:
    """Replicated gradient 5, heads 0 and 12 on two ranks: norm 13, and 1/13 = .0769 on both for max_norm 1."""

    def rank(comm: Communicator) -> Any:
        return head_and_replica(comm, head=12.0, replica=5.0, x=float(comm.rank), max_norm=1.0)

    (norm, first), (other, second) = run_ranks(2, rank)
    assert norm == other == pytest.approx(13.0)
    assert first["shared"] == second["shared"] == pytest.approx(5 * 0.0769, abs=5e-4)
    assert (first["theta"], second["theta"]) == (0.0, pytest.approx(12 / 13))


def test_one_process_needs_no_collective() -> None:
    config = small_config()

    def calls(comm: Communicator) -> set[str]:
        return {c.name for c in train(config, comm, steps=1).log}

    assert alone(calls) == {"gather_to_host"}  # the harness's own sums
