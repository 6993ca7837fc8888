"""Schemes beside one another: what is run, how seeds become a mean, which rows are marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from twinmoe.moe_core import compare
from twinmoe.moe_core.combinations import ConfigError
from twinmoe.moe_core.compare import CompareRequest, entries, marked, scheme_row
from twinmoe.moe_core.compare_figures import read_run
from twinmoe.moe_core.compose import dump
from twinmoe.moe_core.launch import JobFailedError
from twinmoe.testing.moe_core.run_folders import WORDS, record, write_run


def test_settings_belong_to_the_scheme_before_them() -> None:
    found = entries(("ep", "llep", "least_loaded.min_rows=64", "moe.top_k=1"))
    assert [entry.name for entry in found] == ["ep", "llep,least_loaded.min_rows=64,moe.top_k=1"]
    assert found[1].words == ("parallel.scheme=llep", "parallel.least_loaded.min_rows=64", "moe.top_k=1")
    for wrong, told in ((("min_rows=1", "ep"), "begins with"), (("ep", "ep"), "once"), ((), "once")):
        with pytest.raises(ConfigError, match=told):
            entries(wrong)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Jobs that compare starts; each leaves a run folder behind, faster under llep and slower with each seed."""
    started: list[Any] = []

    def start(job: Any, console: Console) -> dict[str, Any]:
        started.append(job)
        llep, seed = job.config.parallel.scheme == "llep", job.config.train.seed
        if "fails" in str(job.run_dir) and llep:
            raise JobFailedError("rank 1 failed\nTraceback\nMemoryError: no room")
        seconds = (0.25 if llep else 0.5) * (1 + seed)
        write_run(job.run_dir, WORDS, [record(n, seconds) for n in range(1, 13)], {"validation_loss": 3.0 + seed})
        (job.run_dir / "config.yaml").write_text(dump(job.config))
        return {"stopped_early": "stops" in str(job.run_dir)}

    monkeypatch.setattr(compare, "start", start)
    return started


def request(folder: Path, **changes: Any) -> CompareRequest:
    settings: dict[str, Any] = {"schemes": ("ep", "llep"), "seeds": 2, "nproc": "2", "run_dir": folder / "runs"}
    return CompareRequest("quickstart", (*WORDS, "train.global_batch_size=4", "backend=cpu"), **(settings | changes))


def test_seeds_are_the_outer_loop_and_rows_are_mean_and_spread(jobs: list[Any], tmp_path: Path) -> None:
    report = compare.run(request(tmp_path), Console(quiet=True))
    assert [(job.config.parallel.scheme, job.config.train.seed) for job in jobs] == [
        ("ep", 0),
        ("llep", 0),
        ("ep", 1),
        ("llep", 1),
    ]
    ep, llep = report["rows"]
    assert (ep["runs"], ep["marks"], llep["marks"]) == (2, [], [])
    assert ep["figures"]["validation_loss"]["mean"] == 3.5
    assert ep["figures"]["validation_loss"]["spread"] == pytest.approx(0.5**0.5)
    assert ep["figures"]["tokens_per_second_per_device"]["values"] == [64.0, 32.0]
    assert llep["speed_up"] == {"mean": 2.0, "spread": 0.0}
    assert ep["bytes_by_level"] == {"node": 1000.0, "host": 500.0}


def test_runs_that_are_there_are_taken_and_others_configs_refused(jobs: list[Any], tmp_path: Path) -> None:
    first = compare.run(request(tmp_path), Console(quiet=True))
    again = compare.run(request(tmp_path), Console(quiet=True))
    assert (len(jobs), again) == (4, first)
    other = request(tmp_path)
    changed = CompareRequest(other.config, (*other.overrides, "train.steps=7"), other.schemes, 2, "2", other.run_dir)
    with pytest.raises(ConfigError, match="another config"):
        compare.run(changed, Console(quiet=True))


def test_a_failing_run_is_a_marked_row_and_the_others_go_on(jobs: list[Any], tmp_path: Path) -> None:
    report = compare.run(request(tmp_path, run_dir=tmp_path / "fails"), Console(quiet=True))
    ep, llep = report["rows"]
    assert (ep["runs"], llep["runs"], len(jobs)) == (2, 0, 4)
    assert (llep["marks"], llep["speed_up"]) == (["failed"], None)
    assert "MemoryError: no room" in llep["failures"][0]


def test_ctrl_c_ends_the_comparison_not_only_its_run(jobs: list[Any], tmp_path: Path) -> None:
    with pytest.raises(JobFailedError, match="goes on from here"):
        compare.run(request(tmp_path, run_dir=tmp_path / "stops"), Console(quiet=True))
    assert len(jobs) == 1


def test_unlike_models_data_and_lengths_are_marked_and_get_no_speed_up(tmp_path: Path) -> None:
    made = {
        "same": write_run(tmp_path / "same"),
        "model": write_run(tmp_path / "model", ["moe.top_k=3"]),
        "data": write_run(tmp_path / "data", summary={"data_hash": "e" * 64}),
        "unknown": write_run(tmp_path / "unknown", summary={"data_hash": None}),
        "short": write_run(tmp_path / "short", records=[record(n) for n in range(1, 7)]),
    }
    rows = marked([scheme_row(name, [read_run(path)], None, []) for name, path in made.items()])
    marks = {row["scheme"]: (row["marks"], row["speed_up"] is not None) for row in rows}
    assert marks == {
        "same": ([], True),
        "model": (["another model"], False),
        "data": (["other data"], False),
        "unknown": (["other data"], False),
        "short": (["other steps"], True),
    }
