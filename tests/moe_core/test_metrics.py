"""Each step is one whole JSON line and single numbers for trackers; a resumed run continues the file."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from twinmoe.moe_core.metrics import METRICS, MetricsWriter, read_metrics
from twinmoe.moe_core.progress import Follower

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


class Notes:
    """A tracker that remembers, and fails where it is told to."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.seen: list[tuple[int, Mapping[str, float]]] = []
        self.closed, self._fails_at = False, fails_at

    def begin(self, run_dir: Path, about: Mapping[str, Any]) -> None: ...

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        if step == self._fails_at:
            raise OSError("no network")
        self.seen.append((step, scalars))

    def close(self) -> None:
        self.closed = True


def test_trackers_get_single_numbers_by_path(tmp_path: Path) -> None:
    notes = Notes()
    writer = MetricsWriter(tmp_path, trackers=[notes])
    writer.write(3, RECORD)
    writer.close()
    assert notes.seen == [(3, {"loss": 2.5, "tokens": 7.0, "phases/data": 0.5})]
    assert notes.closed


def test_a_tracker_that_fails_ends_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failing, whole = Notes(fails_at=2), Notes()
    writer = MetricsWriter(tmp_path, trackers=[failing, whole])
    for step in (1, 2, 3):
        writer.write(step, RECORD)
    writer.close()
    assert [step for step, _ in failing.seen] == [1]
    assert not failing.closed
    assert [step for step, _ in whole.seen] == [1, 2, 3]
    assert len(read_metrics(tmp_path)) == 3
    assert "OSError: no network" in capsys.readouterr().err


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


def test_a_full_disk_costs_records_and_leaves_whole_lines(tmp_path: Path) -> None:
    """What was written of a line before the disk was full goes; the next one that fits is a line of its own."""
    writer = MetricsWriter(tmp_path)
    writer.write(1, RECORD)

    class Full:
        """The file, on a disk with room for ten bytes more."""

        def __init__(self, inner: Any) -> None:
            self.inner, self.left = inner, 10

        def write(self, data: bytes) -> int:
            if not self.left:
                raise OSError(errno.ENOSPC, "No space left on device")
            written, self.left = self.inner.write(data[: self.left]), 0
            return written

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    real = writer._lines
    writer._lines = Full(real)  # type: ignore[assignment]
    writer.write(2, RECORD)
    writer._lines = real
    writer.write(3, RECORD)
    writer.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 3]
    assert writer.lost == 1


def test_a_follower_is_not_misled_by_a_file_that_was_replaced_and_has_grown(tmp_path: Path) -> None:
    first = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        first.write(step, {"loss": 1.0})
    first.close()
    follower = Follower(tmp_path / METRICS)
    assert [r["step"] for r in follower.new_records()] == [1, 2, 3]
    second = MetricsWriter(tmp_path, done=1)
    for step in (2, 3, 4):
        second.write(step, {"loss": 1.25, "longer": True})
    assert [r["step"] for r in follower.new_records()] == [1, 2, 3, 4]
    assert follower.new_records() == []
    second.close()


def test_a_run_that_is_killed_while_it_takes_up_its_records_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write(1, RECORD)
    writer.close()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsWriter(tmp_path, done=1)
    assert read_metrics(tmp_path) == [{"step": 1, **RECORD}]
