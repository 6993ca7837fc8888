"""Figures of a run folder: medians after the warm-up, honest gaps, utilisation by a stated peak."""

from __future__ import annotations

from pathlib import Path

import pytest
from twinmoe.moe_core.combinations import ConfigError
from twinmoe.moe_core.compare_figures import bytes_by_level, figures, read_run
from twinmoe.moe_core.flops import training_flops
from twinmoe.testing.moe_core.run_folders import record, write_run


def test_times_leave_out_the_warm_up(tmp_path: Path) -> None:
    slow_start = [record(n, seconds=9.0 if n <= 5 else 0.5) for n in range(1, 13)]
    found = figures(read_run(write_run(tmp_path / "run", records=slow_start)))
    assert (found["step_seconds"], found["tokens_per_second_per_device"]) == (0.5, 64.0)
    assert found["peak_memory_bytes"] == 13 * 2**20
    assert (found["bytes_per_step"], found["validation_loss"], found["dead_experts"]) == (1500.0, 3.9, 0.0)


def test_what_a_run_does_not_have_is_none(tmp_path: Path) -> None:
    found = figures(read_run(write_run(tmp_path / "run", records=[], ended=False)))
    assert set(found.values()) == {None}
    assert bytes_by_level(read_run(tmp_path / "run")) == {}
    with pytest.raises(ConfigError, match="no run folder"):
        read_run(tmp_path)


def test_losses_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", records=[record(1, loss="nan"), record(2)]))
    assert figures(run)["loss_last"] == pytest.approx(4.8)


def test_utilisation_is_the_models_work_over_the_peak(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert figures(run)["mfu"] is None, "no peak is known of a host"
    assert figures(run, peak_tflops=0.5)["mfu"] == pytest.approx(64.0 * training_flops(run.config) / 0.5e12)
