"""What a new machine is asked, and the file that comes of it."""

from __future__ import annotations

import json
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from twinmoe.backends import registry
from twinmoe.backends.protocol import Launch
from twinmoe.backends.registry import choose, load
from twinmoe.moe_core import acceptance, acceptance_checks, acceptance_steps, cli
from twinmoe.moe_core.acceptance import AcceptanceRequest
from twinmoe.moe_core.combinations import ConfigError
from twinmoe.testing.conftest import load_or_skip


def only(monkeypatch: pytest.MonkeyPatch, **steps: Any) -> None:
    monkeypatch.setattr(acceptance, "STEPS", {name: (step, 5.0) for name, step in steps.items()})


def report_in(bundle: Path) -> dict[str, Any]:
    with tarfile.open(bundle) as packed:
        member = packed.extractfile("twinmoe_acceptance/report.json")
        assert member is not None
        return json.load(member)


@pytest.mark.parametrize("name", ["cpu", "mindspore-cpu"])
def test_a_host_passes_every_check_alone(name: str) -> None:
    """One rank; bfloat16 is skipped by name where the host has none."""
    load_or_skip(name)
    found = acceptance_checks.run_rank(load(name), Launch())["checks"]
    assert [c for c in found if c["status"] == "failed"] == []
    skipped = [c["name"] for c in found if c["status"] == "skipped"]
    assert skipped == [n for n in acceptance_checks.CHECKS if "bfloat16" in n and name == "mindspore-cpu"]
    assert len(found) == len(acceptance_checks.CHECKS)


@pytest.mark.parametrize("kind", acceptance_checks._EXCHANGES)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_what_a_rank_expects_is_what_the_others_send(kind: str, size: int) -> None:
    splits = acceptance_checks._splits(size, kind)
    blocks = [np.split(acceptance_checks._sent(splits, s), np.cumsum(splits[s])[:-1]) for s in range(size)]
    for rank in range(size):
        expected = np.concatenate([blocks[s][rank] for s in range(size)])
        assert np.array_equal(acceptance_checks._expected(splits, rank), expected)


def test_the_patterns_have_the_empty_exchanges_that_they_name() -> None:
    assert not acceptance_checks._splits(4, "none from the first")[0].any()
    assert not acceptance_checks._splits(4, "none to the last")[:, -1].any()
    assert not acceptance_checks._splits(4, "none").any()
    assert acceptance_checks._splits(4, "every pair").all()


def test_a_wrong_answer_is_told_with_its_size() -> None:
    with pytest.raises(AssertionError, match=r"1 of 3 numbers differ, by up to 0\.5"):
        acceptance_checks._same(np.array([1.0, 2.5, 3.0]), np.array([1.0, 2.0, 3.0]))


def test_a_failing_step_hides_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def breaks(_: acceptance_steps.Bench) -> Mapping[str, Any]:
        raise RuntimeError("EI0006: no link\nmore")

    def differs(_: acceptance_steps.Bench) -> Mapping[str, Any]:
        raise acceptance_steps.StepFailedError("2 of 3 differ", {"cases": 3})

    only(monkeypatch, one=breaks, two=differs, three=lambda bench: {"ranks": bench.ranks})
    out = tmp_path / "b.tgz"
    report = acceptance.run(AcceptanceRequest(out, "cpu", "2"))
    assert not report["passed"]
    assert [s["status"] for s in report["steps"]] == ["failed", "failed", "passed"]
    assert [s["report"] for s in report["steps"]] == [{}, {"cases": 3}, {"ranks": 2}]
    assert "failed" in acceptance.lines(report)[0]
    assert acceptance.lines(report)[0].endswith("one: EI0006: no link")
    assert report_in(out)["steps"] == report["steps"]


def test_a_step_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def hangs(_: acceptance_steps.Bench) -> Mapping[str, Any]:
        time.sleep(30)
        return {}

    monkeypatch.setattr(acceptance, "STEPS", {"one": (hangs, 1.1), "two": (lambda _: {}, 5.0)})
    began = time.monotonic()
    report = acceptance.run(AcceptanceRequest(tmp_path / "b.tgz", "cpu", "1"))
    assert time.monotonic() - began < 15
    assert [s["status"] for s in report["steps"]] == ["failed", "passed"]
    assert "not done after 1 s" in report["steps"][0]["error"]


def test_without_time_steps_are_skipped_and_nothing_is_accepted(tmp_path: Path) -> None:
    report = acceptance.run(AcceptanceRequest(tmp_path / "b.tgz", "cpu", "1", limit_s=0.0))
    assert {s["status"] for s in report["steps"]} == {"skipped"}
    assert not report["passed"]


def test_all_limits_fit_under_fifteen_minutes() -> None:
    assert acceptance.TOTAL_S + 60 <= 15 * 60


def test_wrong_requests(tmp_path: Path) -> None:
    (tmp_path / "b.tgz").write_text("")
    with pytest.raises(ConfigError, match="exists; name another file"):
        acceptance.run(AcceptanceRequest(tmp_path / "b.tgz", "cpu"))
    with pytest.raises(ConfigError, match="there is no folder"):
        acceptance.run(AcceptanceRequest(tmp_path / "none" / "b.tgz", "cpu"))


@pytest.mark.slow
@pytest.mark.processes
def test_a_laptop_is_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "b.tgz"
    status = cli.run(["acceptance", "--backend", "cpu", "--nproc", "2", "--out", str(out), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert status == 0, [s["error"] for s in report["steps"]]
    assert report["passed"]
    assert [s["name"] for s in report["steps"]] == list(acceptance_steps.STEPS)
    with tarfile.open(out) as packed:
        names = packed.getnames()
    assert "twinmoe_acceptance/checks/logs/rank_1.log" in names
    assert "twinmoe_acceptance/runs/first/metrics.jsonl" in names
    assert not [name for name in names if "checkpoints" in name]


@pytest.mark.slow
def test_fused_operations_are_timed_beside_plain_ones_in_a_process_of_their_own(tmp_path: Path) -> None:
    report = acceptance_steps._bench_layer(acceptance_steps.Bench(choose("cpu"), 1, tmp_path))
    assert [(row["shape"], row["ops"]) for row in report["rows"]] == [
        (shape, ops) for shape in ("few-experts", "many-experts") for ops in ("fused", "plain")
    ]
    assert report["dtype"] == "float32"
    assert all(row["milliseconds"] > 0 for row in report["rows"])


@pytest.mark.parametrize("home", ["ascend", "ascend-torch"])
def test_hccl_speaks_before_the_checks_are_ended(home: str) -> None:
    told = registry.home_environment(home, acceptance_steps._SOON)
    limit = acceptance_steps.STEPS["checks"][1]
    assert int(told["HCCL_CONNECT_TIMEOUT"]) < int(told["HCCL_EXEC_TIMEOUT"]) < limit
