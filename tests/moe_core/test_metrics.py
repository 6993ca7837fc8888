"""Each step is one whole JSON line and a set of TensorBoard scalars; a resumed run continues the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from twinmoe.moe_core.metrics import METRICS, MetricsWriter, read_metrics

RECORD = {"loss": 2.5, "tokens": 7, "expert_load": [[1, 2], [3, 4]], "phases": {"data": 0.5}, "note": "text"}


def test_a_record_is_one_json_line_as_soon_as_it_is_written(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write(1, RECORD)
    assert read_metrics(tmp_path) == [{"step": 1, **RECORD}]
    writer.close()


def test_numbers_that_are_not_finite_stay_json(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": float("nan"), "parts": [float("inf")]})
    writer.close()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    line = json.loads((tmp_path / METRICS).read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": "nan", "parts": ["inf"]}


def test_tensorboard_gets_single_numbers_by_path(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write(3, RECORD)
    writer.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    values = {tag: board.Tensors(tag)[0] for tag in board.Tags()["tensors"]}
    assert set(values) == {"loss", "tokens", "phases/data"}
    assert values["loss"].step == 3
    assert values["phases/data"].tensor_proto.float_val[0] == pytest.approx(0.5)


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    first = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        first.write(step, {"loss": float(step)})
    first.close()
    with (tmp_path / METRICS).open("a") as lines:
        lines.write('{"step": 4, "lo')
    second = MetricsWriter(tmp_path, done=2)
    second.write(3, {"loss": 30.0})
    second.close()
    assert [record["loss"] for record in read_metrics(tmp_path)] == [1.0, 2.0, 30.0]


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step": 1}\n')
    MetricsWriter(tmp_path).close()
    assert read_metrics(tmp_path) == []
    assert read_metrics(tmp_path / "absent") == []
