"""Bytes and rows in a step's record are those that its collectives moved."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from twinmoe.backends import reference
from twinmoe.backends.reference.comm import Communicator, run_ranks
from twinmoe.moe_core.config import Config
from twinmoe.moe_core.shapes import shapes
from twinmoe.moe_core.train import Session

BACKEND: Any = SimpleNamespace(
    name="reference", ops=reference.ops, comm=reference.comm, trainer=reference.trainer, decided_by="test"
)
NODES = {"name": "pairs", "levels": [{"name": "node", "size": 2}, {"name": "cluster"}]}


def config(**parallel: Any) -> Config:
    train = {"steps": 1, "dtype": "float64", "global_batch_size": 4, "sequence_length": 12}
    model = {"hidden_size": 8, "num_layers": 2, "num_attention_heads": 2}
    moe = {"num_experts": 8, "top_k": 2, "expert_hidden_size": 4}
    return Config.model_validate({"cluster": NODES, "model": model, "moe": moe, "parallel": parallel, "train": train})


def step(setting: Config, folder: Path) -> tuple[dict[str, Any], int, int]:
    """(record, bytes of all all-to-alls, bytes of all collectives inside tensor groups but attention's sums)."""

    def rank(comm: Communicator) -> tuple[dict[str, Any], int, int]:
        session = Session.open(setting, BACKEND, comm, folder)
        start = len(comm.log)
        record = session.train_step()
        log = [c for c in comm.log[start:] if c.group in ("expert", "tensor")]
        rows = sum(c.bytes_sent for c in log if c.name == "all_to_all")
        return record, rows, sum(c.bytes_sent for c in log if c.name in ("all_gather", "reduce_scatter"))

    results = run_ranks(4, rank)
    return results[0][0], sum(r for _, r, _ in results), sum(i for *_, i in results)


@pytest.mark.parametrize("tensor", [1, 2])
def test_bytes_of_a_step_are_those_of_its_forward_collectives(tensor: int, tmp_path: Path):
    how = {"transport": "groupwise", "tensor_parallel_size": 2} if tensor == 2 else {}
    record, rows, inside = step(config(**how), tmp_path)
    level = "groupwise" if tensor == 2 else "flat"
    assert record["bytes"][level] == rows / 2  # backward moves the same again
    assert record["bytes"].get("tensor", 0) == inside / 2
    if tensor == 2:  # an expert group has one rank a node: all of its rows cross
        assert record["bytes_between_nodes"] == record["bytes"][level]
    else:
        assert 0 < record["bytes_between_nodes"] < record["bytes"][level]


@pytest.mark.parametrize("transport", ["flat", "groupwise"])
def test_the_dry_run_says_what_a_step_sends_inside_tensor_groups_and_between_them(transport: str, tmp_path: Path):
    """Every token visits every expert, so that routing is even. Eight bytes are the clipped norm's sum of squares."""
    model = {"hidden_size": 8, "num_layers": 3, "num_dense_layers": 1, "num_attention_heads": 2}
    moe = {"num_experts": 4, "top_k": 4, "expert_hidden_size": 4, "num_shared_experts": 1}
    setting = config(transport=transport, tensor_parallel_size=2)
    setting = Config.model_validate({**setting.model_dump(), "model": model, "moe": moe})

    def rank(comm: Communicator) -> tuple[int, int]:
        session = Session.open(setting, BACKEND, comm, tmp_path)
        start = len(comm.log)
        session.train_step()
        moved = [c for c in comm.log[start:] if c.name in ("all_to_all", "all_gather", "reduce_scatter", "all_reduce")]
        inside = sum(c.bytes_sent for c in moved if c.group == "tensor")
        return inside - 8, sum(c.bytes_sent for c in moved if c.name == "all_to_all")

    expected = shapes(setting, 4).bytes_per_step
    assert run_ranks(4, rank) == [(expected.tensor, expected.dispatch_and_combine)] * 4


def test_on_one_node_nothing_crosses(tmp_path: Path):
    setting = config().model_copy(update={"cluster": Config().cluster})
    record, rows, _ = step(setting, tmp_path)
    assert record["bytes_between_nodes"] == 0
    assert record["bytes"]["flat"] == rows / 2


def test_the_record_tells_rounds_and_changed_layouts_and_losses_stay(tmp_path: Path):
    laer = {
        "planner": "relayout",
        "residency": "fully_sharded",
        "slots_per_rank": 3,
        "relayout": {"skip_below": 0, "hysteresis": 0, "window": 1},
    }

    def records(name: str, **parallel: Any) -> list[dict[str, Any]]:
        def rank(comm: Communicator) -> list[dict[str, Any]]:
            session = Session.open(config(**parallel), BACKEND, comm, tmp_path / name)
            return [session.train_step() for _ in range(5)]

        (tmp_path / name).mkdir()
        return run_ranks(4, rank)[0]

    plain, moving = records("ep"), records("laer", **laer)
    bounded = records("bounded", max_rows_per_rank=8)
    for other in (moving, bounded):
        assert [r["loss"] for r in other] == pytest.approx([r["loss"] for r in plain], rel=1e-9)
    assert plain[0]["plan"] == {"rounds": 2.0}  # one for each of two layers
    assert bounded[0]["plan"]["rounds"] >= 2 * 3
    assert moving[0]["plan"] == {"rounds": 2.0, "layouts_changed": 0.0, "layout_wait_seconds": 0.0}
    assert sum(r["plan"]["layouts_changed"] for r in moving) >= 2
    assert all(r["plan"]["layout_wait_seconds"] >= 0 for r in moving)
