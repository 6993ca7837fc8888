"""Tensor parallelism does not change what is trained: losses, parameters and optimizer state of one process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from twinmoe.backends import reference
from twinmoe.backends.protocol import Group, Launch, Parameter, Piece
from twinmoe.backends.reference.comm import Communicator, run_ranks
from twinmoe.moe_core.build import make_runtime
from twinmoe.moe_core.checkpoint import Checkpoint
from twinmoe.moe_core.combinations import ConfigError, check_combinations
from twinmoe.moe_core.config import Config, MoeConfig, ParallelConfig
from twinmoe.moe_core.exactness import Case, check_case
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.model import build_model
from twinmoe.moe_core.parameters import join_parts, take_part
from twinmoe.moe_core.tensor_parallel import split_parameter, split_stack
from twinmoe.moe_core.train import run
from twinmoe.moe_core.verify import nominal_cluster

BACKEND: Any = SimpleNamespace(
    name="reference", ops=reference.ops, comm=reference.comm, trainer=reference.trainer, decided_by="test"
)
LLEP = {
    "planner": "least_loaded",
    "residency": "borrowed",
    "least_loaded": {"min_rows": 1, "imbalance_threshold": None},
}
SHARED = {"num_shared_experts": 1, "shared_expert_gate": True, "aux_loss_coeff": 0.02, "z_loss_coeff": 0.01}
GPT_OSS = {"attention_sinks": True, "attention_output_bias": True, "sliding_window": 5, "sliding_layers": (0,)}
HOW = {
    "flat": {},
    "groupwise": {"transport": "groupwise"},
    "hierarchical": {"transport": "hierarchical_dedup"},
    "groupwise_llep": {"transport": "groupwise", **LLEP},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("world", "expert", "tensor"), [(2, 1, 2), (4, 2, 2), (6, 2, 3), (8, 2, 2)])
def test_a_layer_is_that_of_the_oracle(how: str, world: int, expert: int, tensor: int):
    for activation, routing in (("swiglu", "idle_rank"), ("gelu", "padding_tail")):
        moe = MoeConfig(num_experts=5, top_k=2, expert_hidden_size=6, activation=activation, **SHARED)  # type: ignore[arg-type]
        case = Case(moe, ParallelConfig.model_validate(HOW[how]), expert=expert, tensor=tensor, routing=routing)

        def rank(comm: Communicator, case: Case = case) -> str:
            mesh = Mesh.over(world, expert, 1, tensor)
            runtime = make_runtime(reference.ops, comm, mesh, case.parallel, nominal_cluster(expert, tensor))
            report = check_case(case, reference, runtime)
            return "" if report.passed(1e-10) else f"{case.name}: {report.where} differs by {report.worst}"

        assert not any(run_ranks(world, rank))


def config(**parallel: Any) -> Config:
    model = {"hidden_size": 8, "num_layers": 2, "num_dense_layers": 1, "num_attention_heads": 4, "qk_norm": True}
    train = {"steps": 2, "dtype": "float64", "global_batch_size": 4, "sequence_length": 12, "save_every": 2}
    return Config.model_validate(
        {
            "model": {**model, **GPT_OSS, "num_key_value_heads": 2, "attention_bias": True},
            "moe": {"num_experts": 5, "top_k": 2, "expert_hidden_size": 4, **SHARED},
            "parallel": parallel,
            "train": {**train, "validation_batches": 1},
        }
    )


def trained(setting: Config, ranks: int, folder: Path, resume: Path | None = None) -> dict[str, Any]:
    folder.mkdir()
    told = None if resume is None else str(resume)
    return run_ranks(ranks, lambda c: run(setting, BACKEND, Launch(c.rank, ranks), folder, told))[0]


def stored(folder: Path) -> dict[tuple[str, str], np.ndarray]:
    """Every whole tensor of the last checkpoint by name and kind."""

    def rank(comm: Communicator) -> dict[str, Parameter]:
        return build_model(config(), make_runtime(reference.ops, comm, Mesh())).parameters

    specs = run_ranks(1, rank)[0]
    return {(n, k): v for n, k, v in Checkpoint(folder / "checkpoints" / "step_00000002").values(specs)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("alone") / "run"
    return trained(config(), 1, folder), folder


@pytest.mark.parametrize(("ranks", "how"), [(2, "flat"), (4, "groupwise"), (4, "hierarchical")])
def test_a_model_trains_as_in_one_process_and_resumes_there(ranks: int, how: str, alone: Any, tmp_path: Path):
    want, folder = alone
    got = trained(config(tensor_parallel_size=2, **HOW[how]), ranks, tmp_path / "run")
    np.testing.assert_allclose(got["losses"], want["losses"], rtol=1e-12)
    assert got["validation_loss"] == pytest.approx(want["validation_loss"], rel=1e-12)
    mine, whole = stored(tmp_path / "run"), stored(folder)
    assert mine.keys() == whole.keys()
    for key, value in whole.items():
        assert np.linalg.norm(mine[key] - value) <= 1e-10 * max(np.linalg.norm(value), 1e-9), key

    longer = config()
    longer = longer.model_copy(update={"train": longer.train.model_copy(update={"steps": 3})})
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    resumed = trained(longer, 1, tmp_path / "longer", checkpoint)
    back = trained(
        longer.model_copy(update={"parallel": config(tensor_parallel_size=2).parallel}),
        2,
        tmp_path / "back",
        folder / "checkpoints" / "step_00000002",
    )
    assert resumed["losses"][-1] == pytest.approx(back["losses"][-1], rel=1e-12)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 1))
def test_parts_join_to_the_whole(ranks: int, blocks: int, width: int, axis: int):
    shape = [3, 3]
    shape[axis] = ranks * blocks * width
    values = np.arange(float(np.prod(shape))).reshape(shape)
    whole = Parameter("w", tuple(shape), lambda: values)
    parts = [split_parameter(whole, Group("tensor", tuple(range(ranks)), r), axis, blocks) for r in range(ranks)]
    cut = [p.initial() for p in parts]
    assert [v.shape for v in cut] == [p.shape for p in parts]
    np.testing.assert_array_equal(join_parts(cut, axis, blocks), values)


def test_gate_and_linear_columns_are_cut_alike():
    piece = Piece("w", (1, 8), start=2, stop=4, axis=1, blocks=2)
    assert take_part(np.arange(8)[None], piece).tolist() == [[2, 3, 6, 7]]
    pieces = (Piece("a", (1, 8)), Piece("b", (1, 8)))
    stack = Parameter("s", (2, 1, 8), lambda: np.arange(16.0).reshape(2, 1, 8), pieces=pieces)
    mine = split_stack(stack, Group("tensor", (0, 1), 1), 1, 2)
    assert mine.shape == (2, 1, 4)
    assert mine.initial()[1].tolist() == [[10, 11, 14, 15]]
    assert (mine.pieces[0].start, mine.pieces[0].stop, mine.norm_over) == (2, 4, "expert_tensor")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"moe": {"expert_hidden_size": 5}}, "divides the hidden sizes"),
        ({"model": {"num_attention_heads": 3, "hidden_size": 6}}, "key-value heads"),
        ({"parallel": {"tensor_parallel_size": 2, "residency": "fully_sharded"}}, "cut across columns"),
        ({"moe": {"num_heads": 2, "head_dim": 4}}, "head_parallel_size"),
        ({"moe": {"expert_hidden_size": 4, "expert_bias": True}}, "added once per rank"),
        ({"model": {"qk_norm": "whole"}}, "needs them on one rank"),
    ],
)
def test_what_cannot_be_cut_is_refused(changed: dict[str, Any], told: str):
    whole = {"parallel": {"tensor_parallel_size": 2}, "moe": {"expert_hidden_size": 4}, **changed}
    with pytest.raises(ConfigError, match=told):
        check_combinations(Config.model_validate(whole))
