"""Experts that change places between steps: weights and optimizer state follow, the training does not notice."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from twinmoe.backends import reference
from twinmoe.backends.protocol import Launch
from twinmoe.backends.reference.comm import Communicator, run_ranks
from twinmoe.moe_core.config import Config
from twinmoe.moe_core.placement import count_demand, demand_from, exchange_rows, exchanged, move_of, rank_of_expert
from twinmoe.moe_core.planners.static import owners, slot_table
from twinmoe.moe_core.planners.swap import demand_of
from twinmoe.moe_core.topology import Level, Link, Topology
from twinmoe.moe_core.train import Session, run

BACKEND: Any = SimpleNamespace(
    name="reference", ops=reference.ops, comm=reference.comm, trainer=reference.trainer, decided_by="test"
)
NODES = {"name": "pairs", "levels": [{"name": "node", "size": 2}, {"name": "cluster"}]}


def config(**parallel: Any) -> Config:
    return Config.model_validate(
        {
            "cluster": NODES,
            "model": {"hidden_size": 8, "num_layers": 2, "num_attention_heads": 2},
            "moe": {"num_experts": 9, "top_k": 2, "expert_hidden_size": 4, "num_shared_experts": 1},
            "parallel": {"swap": {"min_gain": 0}, **parallel},
            "train": {
                "steps": 3,
                "dtype": "float64",
                "global_batch_size": 4,
                "sequence_length": 12,
                "validation_batches": 1,
            },
        }
    )


FIXED = config()
SWAPPED = {
    "hierarchical": config(placement="swap", transport="hierarchical_dedup"),
    "flat": config(placement="swap"),
    "every_2": config(placement="swap", swap={"every": 2, "min_gain": 0}),
    "load": config(placement="swap", swap={"objective": "load", "min_gain": 0}),
    "borrowed": config(
        placement="swap",
        planner="least_loaded",
        residency="borrowed",
        least_loaded={"min_rows": 1, "imbalance_threshold": None},
    ),
}


def trained(setting: Config, ranks: int, folder: Path) -> tuple[dict[str, np.ndarray], list[float], int]:
    """(every tensor by kind and logical name, losses, experts that are not where they started)."""

    def rank(comm: Communicator) -> tuple[Session, dict[str, np.ndarray]]:
        session = Session.open(setting, BACKEND, comm, folder)
        for _ in range(setting.train.steps):
            session.train_step()
        values = {}
        specs = session.parameters
        for name, kind, value in BACKEND.trainer.tensors(session.state):
            spec = specs[name]
            parts = zip([p.name for p in spec.pieces], value) if spec.pieces else [(name, value)]
            values.update({f"{kind} {logical}": part for logical, part in parts})
        return session, values

    results = run_ranks(ranks, rank)
    whole = {name: value for _, values in results for name, value in values.items()}
    home = slot_table(owners(9, ranks), ranks)
    moved = sum(int((layer.planner.owned_RC != home).sum()) for layer in results[0][0].placed)
    return whole, results[0][0].losses, moved


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, np.ndarray], list[float], int]:
    return trained(FIXED, 4, tmp_path_factory.mktemp("fixed"))


@pytest.mark.parametrize("name", SWAPPED)
def test_parameters_and_optimizer_state_are_those_of_a_run_without_swaps(name: str, fixed: Any, tmp_path: Path):
    want, losses, _ = fixed
    got, same, moved = trained(SWAPPED[name], 4, tmp_path)
    assert moved > 0
    np.testing.assert_allclose(same, losses, rtol=1e-12)
    assert got.keys() == want.keys()
    for key, value in want.items():
        scale = max(float(np.linalg.norm(value)), 1e-12)
        assert np.linalg.norm(got[key] - value) / scale < 1e-10, key


def test_a_run_resumed_after_swaps_goes_on_with_them_and_at_another_number_of_ranks(tmp_path: Path):
    setting = SWAPPED["hierarchical"]
    setting = setting.model_copy(update={"train": setting.train.model_copy(update={"save_every": 2})})

    def train(folder: Path, ranks: int, resume: str | None, steps: int) -> dict[str, Any]:
        folder.mkdir()
        part = setting.model_copy(update={"train": setting.train.model_copy(update={"steps": steps})})
        return run_ranks(ranks, lambda c: run(part, BACKEND, Launch(c.rank, ranks), folder, resume))[0]

    whole = train(tmp_path / "whole", 4, None, 4)
    train(tmp_path / "parts", 4, None, 2)
    saved = str(tmp_path / "parts" / "checkpoints" / "step_00000002")
    resumed = train(tmp_path / "same", 4, saved, 4)
    elsewhere = train(tmp_path / "other", 2, saved, 4)
    assert resumed["losses"] == whole["losses"]
    np.testing.assert_allclose(elsewhere["losses"], whole["losses"], rtol=1e-12)


def test_every_rank_decides_the_same_swaps(tmp_path: Path):
    def rank(comm: Communicator) -> list[Any]:
        session = Session.open(SWAPPED["hierarchical"], BACKEND, comm, tmp_path)
        assert session.swapper is not None
        decided, whole = [], session.swapper.after_step
        session.swapper.after_step = lambda *given: decided.append(whole(*given)) or decided[-1]  # type: ignore[method-assign]
        records = [session.train_step() for _ in range(3)]
        assert [r["swaps"] for r in records] == [sum(s is not None for s in swaps) for swaps in decided]
        return [decided, [layer.planner.owned_RC.tolist() for layer in session.placed]]

    first, *others = run_ranks(4, rank)
    assert any(swap is not None for swaps in first[0] for swap in swaps)
    assert all(other == first for other in others)


def test_swapping_a_pair_twice_restores_every_tensor_bit_by_bit(tmp_path: Path):
    def rank(comm: Communicator) -> bool:
        session = Session.open(SWAPPED["flat"], BACKEND, comm, tmp_path)
        session.train_step()
        assert session.swapper is not None
        layer = session.placed[0]
        before = {(n, k): v for n, k, v in BACKEND.trainer.tensors(session.state)}
        table = layer.planner.owned_RC
        for _ in range(2):
            move = move_of(layer, 0, 8, comm.rank)
            moves, group = [] if move is None else [move], session.runtime.groups["expert"]
            exchange_rows(reference.ops, BACKEND.trainer, session.state, comm, group, moves)
            layer.planner.owned_RC = exchanged(layer.planner.owned_RC, 0, 8)
        after = {(n, k): v for n, k, v in BACKEND.trainer.tensors(session.state)}
        np.testing.assert_array_equal(layer.planner.owned_RC, table)
        return all(np.array_equal(before[key], after[key]) for key in before)

    assert all(run_ranks(4, rank))


def test_a_swap_copies_and_sends_one_expert_s_weights_and_moments_and_nothing_else(tmp_path: Path):
    def refuse(*_: Any) -> Any:
        raise AssertionError("the whole model was copied to the host")

    def rank(comm: Communicator) -> tuple[int, int, bool]:
        session = Session.open(SWAPPED["flat"], BACKEND, comm, tmp_path)
        session.train_step()
        trainer: Any = SimpleNamespace(**{**vars(BACKEND.trainer), "tensors": refuse, "load_tensors": refuse})
        layer, group = session.placed[0], session.runtime.groups["expert"]
        move = move_of(layer, 0, 8, comm.rank)
        start = len(comm.log)
        moves = [] if move is None else [move]
        told = exchange_rows(reference.ops, trainer, session.state, comm, group, moves)
        moved = [c.bytes_sent for c in comm.log[start:] if c.name == "exchange"]
        return told, sum(moved), move is not None

    results = run_ranks(4, rank)
    assert [told for told, _, _ in results] == [moved for _, moved, _ in results]
    assert sum(moves for *_, moves in results) == 2
    assert {told for told, _, moves in results if moves} == {
        3 * 8 * (8 * 8 + 4 * 8)
    }  # parameter and two moments of (8, 2 x 4) and (4, 8)


def test_counts_on_the_device_are_those_of_the_policy():
    rng = np.random.default_rng(0)
    ids = np.where(rng.random((20, 3)) < 0.1, -1, np.argsort(rng.random((20, 8)), axis=1)[:, :3])
    rank_E = rng.permutation(np.arange(8) // 2)
    chosen = np.stack([(ids == e).any(1) for e in range(8)], 1).astype(np.int64)
    flat = reference.ops.to_numpy(count_demand(reference.ops, reference.ops.asarray(ids), rank_E, (2, 4)))
    got, want = demand_from(flat, rank_E, (2, 4)), demand_of(chosen, rank_E, 4, (2, 4))
    np.testing.assert_array_equal(got.load_E, want.load_E)
    for a, b in zip(got.levels, want.levels, strict=True):
        for name in ("unit_E", "hit_U", "miss_EU", "sole_EE"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_the_table_of_owned_experts():
    table = slot_table(owners(5, 2), 2)
    assert rank_of_expert(table).tolist() == [0, 0, 0, 1, 1]
    after = exchanged(table, 1, 4)
    assert after.tolist() == [[0, 4, 2], [3, 1, -1]]
    assert rank_of_expert(after).tolist() == [0, 1, 0, 1, 0]


def test_links_that_nobody_measured_are_ten_times_slower_outwards():
    guessed = Topology(8, (Level("a", 1), Level("b", 2), Level("c", 4))).with_nominal_links()
    assert [x.within.beta for x in guessed.levels] == pytest.approx([1e-9, 1e-10, 1e-11])
    assert [x.rails.beta for x in guessed.levels[1:]] == pytest.approx([1e-9, 1e-10])
    measured = Topology(8, (Level("a", 1, Link(0, 1e-9)),))
    assert measured.with_nominal_links() is measured
