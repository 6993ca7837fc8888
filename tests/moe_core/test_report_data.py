"""What charts are drawn from: thinned to a screen, means that keep their meaning, gaps that stay gaps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from twinmoe.moe_core.compare_figures import read_run
from twinmoe.moe_core.report_data import PERIODS, POINTS, chart_data, experts, rank_load
from twinmoe.testing.moe_core.run_folders import record, write_run


def test_curves_are_thinned_to_means(tmp_path: Path) -> None:
    steps = 2 * POINTS + 1
    data = chart_data(read_run(write_run(tmp_path / "run", records=[record(n, loss=n) for n in range(steps)])), "run")
    assert len(data["curves"]["loss"]) == len(data["x"]["tokens"]) <= POINTS
    assert data["curves"]["loss"][0] == np.mean(range(3))
    assert data["x"]["steps"][:2] == [1.0, 4.0]
    json.dumps(data, allow_nan=False)


def test_validation_lies_where_it_was_taken_and_ends_with_the_summary(tmp_path: Path) -> None:
    data = chart_data(read_run(write_run(tmp_path / "run", records=[record(n) for n in range(1, 11)])), "run")
    assert data["validation"]["steps"] == [4.0, 8.0, 10.0]
    assert data["validation"]["loss"][-1] == 3.9
    assert data["validation"]["tokens"] == [256.0, 512.0, 640.0]
    assert data["phases"].keys() == {"data", "forward_backward", "optimizer", "other"}


def test_a_run_without_records_has_nothing_of_anything(tmp_path: Path) -> None:
    data = chart_data(read_run(write_run(tmp_path / "run", records=[], ended=False)), "run")
    assert (data["curves"]["loss"], data["experts"], data["rank_load"], data["phases"], data["bytes"]) == (
        [],
        {},
        {},
        {},
        {},
    )


def test_numbers_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    data = chart_data(read_run(write_run(tmp_path / "run", records=[record(1), record(2, loss="nan")])), "run")
    assert data["curves"]["loss"] == [4.9, None]


def test_load_of_a_period_is_over_the_mean_of_its_layer() -> None:
    records = [record(n, expert_load=[[2, 2, 4, 0], [1, 1, 1, 1]]) for n in range(1, 2 * PERIODS + 1)]
    found = experts(records)
    assert len(found["periods"]) == PERIODS
    assert found["periods"][0] == "1-2"
    assert found["load"][0] == [[1.0, 1.0, 2.0, 0.0], [1.0] * 4]
    assert found["most"] == [[2.0] * PERIODS, [1.0] * PERIODS]
    assert rank_load([record(1, rows_per_rank=[30, 10])])["load"] == [[1.5], [0.5]]
    assert experts([record(1, expert_load=[])]) == {}


def test_a_run_that_went_on_with_other_ranks_has_gaps() -> None:
    found = rank_load([record(1, rows_per_rank=[30, 10]), record(2, rows_per_rank=[4, 4, 8])])
    assert found["load"] == [[1.5, 0.75], [0.5, 0.75], [None, 1.5]]
